// What the page asks its server, and what that answers.

export const KEY = "cvx-deploy-key"; // of sessionStorage
let refusedKey = () => null;

export function onRefusedKey(act) {
  refusedKey = act;
}

class Refusal extends Error {
  constructor({ message, param = null }, status = 0) {
    const [what, fix] = message.split(/[.]? fix: /);
    super(sentence(what) + (fix ? ` ${sentence(fix)}` : ""));
    Object.assign(this, { param, status });
  }
}

export function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1).replace(/[.]$/, "")}.`;
}

export async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}`, ...options.headers } : options.headers;
  const response = await fetch(path, { ...options, headers }).catch(() => {
    throw new Refusal({ message: "the server does not answer. fix: try again in a moment." });
  });
  if (response.ok) return response;
  if (response.status === 401 && key === sessionStorage.getItem(KEY)) refusedKey(key !== null);
  const found = await response.json().catch(() => null);
  throw new Refusal(found?.error ?? { message: `the server answered ${response.status}` }, response.status);
}

export const json = async (path, options) => (await request(path, options)).json();

export const post = (path, body) =>
  json(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [, kind, told] = /^event: (.*)\ndata: (.*)$/.exec(block) ?? [];
      if (kind) yield [kind, JSON.parse(told)];
    }
  }
}
