# docker build -f deploy/cpu.Dockerfile -t cvx-deploy .
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir "/src[serve,openvino]" && useradd --create-home --uid 1000 cvx
USER cvx
WORKDIR /home/cvx
RUN mkdir served engines
VOLUME ["/home/cvx/served", "/home/cvx/engines"]
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["cvx-deploy", "serve", "--host", "0.0.0.0"]
CMD ["--model", "mini", "--api-keys", "/run/secrets/keys.txt"]
