// The page of `cvx-deploy serve`: asks for videos, follows how they are made, and shows them.

import { KEY, events, json, onRefusedKey, post, request, sentence } from "./server.js";

const FOLLOWED = 3; // streams of events at once: browsers open six connections to a server
const PAGE = 24; // videos that are shown first, and more of them at a time
const [BUSY, IDLE] = [2000, 10000]; // milliseconds between two looks at the list
const TINY = 160; // pixels of a side below which a video is shown as the squares that it consists of

const find = (id) => document.getElementById(id);
const ask = find("ask");
const cards = new Map(); // of the videos that are shown, by id
let models = [];
let wanted = PAGE;
let taken = null; // the card whose video the next one starts from
let timer;
let visit = 0; // goes up when a key is forgotten: what was asked for with it is not shown after
let last = Promise.resolve(); // looks at the list come one after the other

function announce(text) {
  find("live").textContent = text;
}

// Who may come in

function lock(refused) {
  sessionStorage.removeItem(KEY);
  visit += 1;
  clearTimeout(timer);
  find("unlock").hidden = false;
  document.querySelector("main").hidden = find("forget").hidden = true;
  find("key-failure").textContent = refused ? "That key is not valid here." : "";
  find("key").focus();
}

onRefusedKey(lock);

find("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value);
  find("key").value = "";
  start();
});

find("forget").addEventListener("click", () => {
  for (const id of [...cards.keys()]) drop(id);
  lock(false);
});

// What is asked for

function options(select, entries) {
  const chosen = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === chosen)) select.value = chosen;
}

function fitModel() {
  const model = models.find((one) => one.id === find("model").value);
  options(find("size"), [...new Set(model.sizes.map((one) => one.size))].map((size) => [size, size.replace("x", " × ")]));
  const lengths = model.sizes.filter((one) => one.size === find("size").value);
  options(find("frames"), lengths.map((one) => [one.num_frames, `${one.num_frames} frames, ${Number(one.seconds).toFixed(1)} s`]));
  find("steps").placeholder = model.defaults.steps;
  find("guidance").placeholder = model.defaults.guidance_scale;
  find("image-field").hidden = find("image").disabled = model.source !== "image";
  fitSource();
}

function fitSource() {
  const takes = models.find((one) => one.id === find("model").value).source === "video";
  find("clip-field").hidden = !takes;
  find("clip").hidden = find("clip").disabled = !takes || taken !== null;
  find("taken").hidden = taken === null;
  find("strength-field").hidden = find("strength").disabled = !takes || !(taken || find("clip").files.length);
}

const takers = () => models.filter((model) => model.source === "video").map((model) => model.id);

function edit(card) {
  const { model, size, num_frames: frames, prompt } = card.video;
  taken = card;
  find("taken").querySelector("p").textContent = prompt;
  find("taken").querySelector("img").src = card.part(".play img").src;
  if (!takers().includes(find("model").value)) find("model").value = takers().includes(model) ? model : takers()[0];
  fitModel();
  for (const [id, value] of [["size", size], ["frames", frames]]) {
    if ([...find(id).options].some((option) => option.value === String(value))) find(id).value = value;
    if (id === "size") fitModel();
  }
  find("prompt").value = prompt;
  find("prompt").focus();
  find("prompt").select();
  announce("The next video starts from this one. Say what it is to become.");
}

function untake() {
  taken = null;
  find("clip").value = "";
  fitSource();
}

function showImage() {
  const [file] = find("image").files;
  const preview = find("image-preview");
  URL.revokeObjectURL(preview.src);
  preview.hidden = !file;
  if (file) preview.src = URL.createObjectURL(file);
}

function fail(field, message) {
  const place = find("failure");
  if (field) field.after(place);
  else ask.querySelector(".main").before(place);
  place.textContent = message;
  for (const one of ask.elements) one.removeAttribute("aria-invalid");
  if (!field) return;
  field.closest("details")?.setAttribute("open", "");
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", "failure");
  field.focus();
}

async function send(event) {
  event.preventDefault();
  fail(null, "");
  const wrong = [...ask.elements].find((field) => !field.checkValidity());
  if (wrong) return fail(wrong, `${wrong.labels[0].textContent}: ${sentence(wrong.validationMessage)}`);
  const body = new FormData(ask);
  for (const [name, value] of [...body]) if (value === "" || value.size === 0) body.delete(name);
  const from = taken && !find("clip-field").hidden;
  if (from) body.set("video[id]", taken.id);
  const button = ask.querySelector(".main");
  button.disabled = true;
  try {
    await json(from || body.has("video") ? "/v1/videos/edits" : "/v1/videos", { method: "POST", body });
    announce("The video is in the queue.");
    await look();
  } catch (error) {
    fail(error.param && ask.elements[error.param], error.message);
  }
  button.disabled = false;
}

ask.addEventListener("submit", send);
ask.addEventListener("input", () => fail(null, ""));
ask.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
});
for (const id of ["model", "size"]) find(id).addEventListener("change", fitModel);
find("image").addEventListener("change", showImage);
find("clip").addEventListener("change", fitSource);
find("untake").addEventListener("click", () => {
  untake();
  find("clip").focus();
});

// What there is

async function listed() {
  const videos = [];
  let more = true;
  while (more && videos.length < wanted) {
    const after = videos.length ? `&after=${videos.at(-1).id}` : "";
    const page = await json(`/v1/videos?limit=${Math.min(wanted - videos.length, 100)}${after}`);
    videos.push(...page.data);
    more = page.has_more;
  }
  find("more").hidden = !more;
  return videos;
}

function look() {
  last = last.then(lookNow);
  return last;
}

async function lookNow() {
  const own = visit;
  clearTimeout(timer);
  try {
    await showReadiness();
    const videos = await listed();
    if (own !== visit) return;
    const there = new Set(videos.map((video) => video.id));
    for (const id of [...cards.keys()]) if (!there.has(id)) drop(id);
    videos.forEach((video, place) => {
      if (!cards.has(video.id)) cards.set(video.id, newCard(video.id));
      const { element } = cards.get(video.id);
      const gallery = find("gallery");
      if (gallery.children[place] !== element) gallery.insertBefore(element, gallery.children[place] ?? null);
      show(cards.get(video.id), video);
    });
    find("none").hidden = videos.length > 0;
    const active = videos.filter(isActive).reverse();
    for (const video of active.slice(0, FOLLOWED)) follow(cards.get(video.id));
  } catch (error) {
    if (own !== visit) return;
    readiness(error.message, "gone");
  }
  timer = setTimeout(look, [...cards.values()].some((card) => isActive(card.video)) ? BUSY : IDLE);
}

const isActive = (video) => video.status === "queued" || video.status === "in_progress";

async function showReadiness() {
  const response = await fetch("/readyz").catch(() => null);
  if (response?.ok) readiness("Ready", "ready");
  else if (response) readiness("Starting: videos wait until the models are loaded", "");
}

function readiness(text, kind) {
  const place = find("readiness");
  if (place.textContent !== text) place.textContent = text;
  place.className = kind;
}

function drop(id) {
  const card = cards.get(id);
  if (taken === card) untake();
  cards.delete(id);
  card.stream?.abort();
  for (const address of card.addresses.values()) address.then(URL.revokeObjectURL, () => null);
  card.element.remove();
}

// One video

function newCard(id) {
  const element = find("card").content.firstElementChild.cloneNode(true);
  const part = (selector) => element.querySelector(selector);
  const card = { id, element, part, video: {}, addresses: new Map(), stream: null };
  part("h3").id = `title-${id}`;
  for (const labelled of element.querySelectorAll("button, progress, video")) {
    labelled.setAttribute("aria-describedby", `title-${id}`);
  }
  part("progress").setAttribute("aria-label", "Progress");
  part(".play").setAttribute("aria-label", "Play");
  const acts = { play: () => play(card), cancel: () => cancel(card), download: () => download(card), again: () => again(card), edit: () => edit(card) };
  for (const [name, act] of Object.entries(acts)) part(`.${name}`).addEventListener("click", () => attempt(card, act));
  part(".delete").addEventListener("click", () => attempt(card, () => remove(card)));
  part(".delete").addEventListener("blur", () => (part(".delete").textContent = "Delete"));
  return card;
}

async function attempt(card, act) {
  try {
    card.part(".failure").textContent = "";
    await act();
  } catch (error) {
    card.part(".failure").textContent = error.message;
    announce(error.message);
  }
}

function show(card, video) {
  const { part, element } = card;
  const before = card.video.status;
  const cancelling = document.activeElement === part(".cancel");
  const [width, height] = video.size.split("x").map(Number);
  card.video = video;
  element.classList.toggle("making", video.status === "in_progress");
  element.classList.toggle("tiny", Math.min(width, height) < TINY);
  part("h3").textContent = part("h3").title = video.prompt;
  part(".facts").textContent =
    `${video.model} · ${width} × ${height} · ${Number(video.seconds).toFixed(1)} s · ${video.num_inference_steps} steps · seed ${video.seed}`;
  const active = isActive(video);
  part("progress").hidden = part(".cancel").hidden = !active;
  part(".download").hidden = video.status !== "completed";
  part(".edit").hidden = video.status !== "completed" || !takers().length;
  part(".again").hidden = part(".delete").hidden = active;
  if (cancelling && !active) part(".again").focus();
  part("progress").value = video.progress;
  if (video.status === "queued") part(".state").textContent = waiting(video);
  if (before === video.status) return;
  if (video.error) part(".failure").textContent = sentence(video.error.message);
  const states = { queued: waiting(video), in_progress: "Beginning", failed: "Failed", cancelled: "Cancelled", completed: "" };
  part(".state").textContent = states[video.status];
  if (!active) part(".preview").hidden = true;
  if (before) announce(`${states[video.status] || "Ready"}: ${video.prompt}`);
  if (video.status !== "completed") return;
  part(".play").hidden = false;
  content(card, "thumbnail").then((address) => (part(".play img").src = part("video").poster = address), () => null);
  if (before && !matchMedia("(prefers-reduced-motion: reduce)").matches) attempt(card, () => play(card));
}

function waiting({ jobs_ahead: ahead }) {
  return ahead ? `Waiting, ${ahead} before it` : "Waiting, it is next";
}

function content(card, variant) {
  const path = `/v1/videos/${card.id}/content?variant=${variant}`;
  if (!sessionStorage.getItem(KEY)) return Promise.resolve(path);
  if (!card.addresses.has(variant)) {
    const file = request(path).then((response) => response.blob());
    card.addresses.set(variant, file.then(URL.createObjectURL));
  }
  return card.addresses.get(variant);
}

async function play(card) {
  const video = card.part("video");
  const focused = document.activeElement === card.part(".play");
  video.src = await content(card, "video");
  card.part(".play").hidden = true;
  video.hidden = false;
  if (focused) video.focus();
  await video.play().catch(() => null); // a browser may refuse to start by itself; there are controls
}

async function cancel(card) {
  card.part(".state").textContent = "Cancelling";
  show(card, await post(`/v1/videos/${card.id}/cancel`, {}));
}

async function download(card) {
  const link = document.createElement("a");
  link.href = await content(card, "video");
  link.download = `${card.id}.mp4`;
  link.click();
}

async function again(card) {
  const [seed] = crypto.getRandomValues(new Uint32Array(1));
  await post(`/v1/videos/${card.id}/remix`, { prompt: card.video.prompt, seed });
  announce(`In the queue again, with seed ${seed}.`);
  await look();
}

async function remove(card) {
  const button = card.part(".delete");
  if (button.textContent === "Delete") {
    button.textContent = "Delete for good?";
    return announce("Press again to delete the video for good.");
  }
  await json(`/v1/videos/${card.id}`, { method: "DELETE" });
  const next = (card.element.nextElementSibling ?? card.element.previousElementSibling)?.querySelector(".again:not([hidden])");
  drop(card.id);
  (next ?? find("videos-title")).focus();
  announce("The video is deleted.");
  await look();
}

// How it is made

async function follow(card) {
  if (card.stream) return;
  card.stream = new AbortController();
  let ended = false;
  try {
    const { body } = await request(`/v1/videos/${card.id}/events`, { signal: card.stream.signal });
    for await (const [kind, told] of events(body)) ended = hear(card, kind, told);
  } catch {
    // it is followed anew with the next look
  }
  card.stream = null;
  if (ended && cards.has(card.id)) await look();
}

function hear(card, kind, told) {
  const { part } = card;
  if (told.progress !== undefined) part("progress").value = told.progress;
  if (kind === "step") part(".state").textContent = `Step ${told.index + 1} of ${told.count}`;
  else if (kind === "resumed") part(".state").textContent = `Goes on after step ${told.taken} of ${told.count}`;
  else if (kind === "frames") {
    part(".state").textContent = `Frame ${told.made} of ${told.count}`;
    part(".preview").src = told.preview;
    part(".preview").hidden = false;
  } else if (told.object === "video") {
    show(card, told);
    return !isActive(told);
  }
  return kind === "deleted";
}

async function start() {
  try {
    models = (await json("/v1/models")).data;
  } catch (error) {
    if (error.status !== 401) {
      readiness(error.message, "gone");
      setTimeout(start, IDLE);
    }
    return;
  }
  find("unlock").hidden = true;
  document.querySelector("main").hidden = false;
  find("forget").hidden = !sessionStorage.getItem(KEY);
  options(find("model"), models.map((model) => [model.id, model.id]));
  fitModel();
  if (document.activeElement === document.body) find("prompt").focus();
  await look();
}

find("more").addEventListener("click", () => {
  wanted += PAGE;
  look();
});
start();
