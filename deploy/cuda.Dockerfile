# docker build -f deploy/cuda.Dockerfile -t cvx-deploy:cuda . && docker run --gpus all ...
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/cvx
ENV PATH=/opt/cvx/bin:$PATH
COPY . /src
RUN pip install --no-cache-dir "/src[serve,tensorrt]" && useradd --create-home --uid 1001 cvx
USER cvx
WORKDIR /home/cvx
RUN mkdir served engines
VOLUME ["/home/cvx/served", "/home/cvx/engines"]
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["cvx-deploy", "serve", "--host", "0.0.0.0", "--engine", "tensorrt"]
CMD ["--model", "5b", "--api-keys", "/run/secrets/keys.txt"]
