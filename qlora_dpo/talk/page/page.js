// The page of `qlora-dpo serve`. Whatever a model wrote is put in as text and never as HTML.

const find = (id) => document.getElementById(id);
const HISTORY = "qlora-dpo.history", SETTINGS = "qlora-dpo.settings", KEY = "qlora-dpo.key";
const MOST_KEPT = 50; // conversations; a browser gives a page about 5 MB

let about = { models: [], collect: false, defaults: {} };
let settings = { system: "", blind: false, theme: "auto", voice: "", ...read(localStorage, SETTINGS) };
let conversation = anew();
let running = null; // the AbortController of the answers that are being written

function read(store, name) {
  try { return JSON.parse(store.getItem(name)) ?? undefined; } catch { return undefined; }
}

function write(store, name, value) {
  try { store.setItem(name, JSON.stringify(value)); } catch { /* full or forbidden: the page works without */ }
}

function anew() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), system: null, turns: [] };
}

function made(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// The server

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  let sentence = `the server answered ${answer.status}`;
  try { sentence = (await answer.json()).error.message; } catch { /* no JSON: the number must do */ }
  throw Object.assign(new Error(sentence), { status: answer.status });
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function messagesBefore(turn) {
  const messages = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  for (const each of conversation.turns) {
    messages.push({ role: "user", content: each.question });
    if (each === turn) break;
    messages.push({ role: "assistant", content: each.answers[each.kept].text });
  }
  return messages;
}

async function writeAnswer(turn, answer, signal) {
  const began = performance.now();
  const request = { model: answer.model, messages: messagesBefore(turn), stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (Number.isFinite(settings[name])) request[name] = settings[name];
  }
  if (turn.answers.length === 2) request.seed = turn.seed; // both draw alike, so that the models make the difference
  try {
    for await (const event of events(await ask("/v1/chat/completions", request, signal))) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content) { answer.text += choice.delta.content; showText(answer); }
      if (choice?.finish_reason) answer.reason = choice.finish_reason;
      if (event.usage) answer.usage = event.usage;
    }
  } catch (error) {
    if (error.name === "AbortError") answer.reason = "stopped";
    else { answer.wrong = error.message; if (error.status === 401) askForKey(error.message); }
  }
  answer.seconds = (performance.now() - began) / 1000;
  answer.done = true;
  showAnswer(turn, answer);
}

async function answer(turn) {
  running = new AbortController();
  showState();
  await Promise.all(turn.answers.map((each) => writeAnswer(turn, each, running.signal)));
  running = null;
  // the tuned model's answer goes on, until a vote says otherwise
  const said = (each) => each.text.trim() !== "";
  const first = turn.answers.find((each) => said(each) && each.model === tuned()) ?? turn.answers.find(said);
  if (first) { turn.kept = turn.answers.indexOf(first); keep(); }
  else { // nothing was said: the question is given back
    conversation.turns.splice(conversation.turns.indexOf(turn), 1);
    find("text").value ||= turn.question;
    tell(turn.answers.map((each) => each.wrong).find(Boolean) ?? "stopped before the first word");
  }
  show();
  find("text").focus();
}

function send() {
  const text = find("text").value.trim();
  if (!text || running) return;
  tell("");
  find("text").value = "";
  grow();
  if (!conversation.turns.length) conversation.system = settings.system.trim() || null;
  const names = settings.voice === "both" ? about.models.map((each) => each.id) : [settings.voice];
  if (names.length === 2 && settings.blind && Math.random() < 0.5) names.reverse();
  const blind = names.length === 2 && settings.blind && about.collect;
  const answers = names.map((model) => ({ model, text: "", reason: null, done: false, wrong: null }));
  const turn = { question: text, answers, kept: 0, voted: null, blind, seed: Math.floor(Math.random() * 2 ** 31) };
  conversation.turns.push(turn);
  show();
  answer(turn);
}

async function vote(turn, place) {
  const [chosen, rejected] = [turn.answers[place], turn.answers[1 - place]];
  const told = (each) => ({ content: each.text, model: each.model });
  try {
    await ask("/v1/preferences", { messages: messagesBefore(turn), chosen: told(chosen), rejected: told(rejected) });
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    return tell(error.message);
  }
  turn.voted = place;
  if (turn === conversation.turns.at(-1)) turn.kept = place; // what came later was said to the answer that was kept
  keep();
  show();
  tell("");
  find("text").focus();
}

// What is shown

const tuned = () => about.models[0]?.id;
const tell = (sentence) => { find("told").textContent = sentence; };
const nameOf = (turn, place) => turn.blind && turn.voted === null ? `answer ${"AB"[place]}` : turn.answers[place].model;

function showText(answer) {
  answer.place.textContent = answer.text;
  const main = find("talk");
  if (main.scrollHeight - main.scrollTop - main.clientHeight < 120) main.scrollTop = main.scrollHeight;
}

function figures(answer) {
  if (!answer.usage) return answer.reason === "stopped" ? "stopped" : "";
  const { completion_tokens: tokens, prompt_tokens_details: details } = answer.usage;
  const cut = answer.reason === "length" ? " · cut at the limit" : "";
  return `${tokens} tokens · ${(tokens / answer.seconds).toFixed(1)}/s · ${details.cached_tokens} reused${cut}`;
}

function showAnswer(turn, answer) {
  const place = turn.answers.indexOf(answer), name = nameOf(turn, place), voted = turn.voted === place;
  const said = made("div", { class: "said" }, answer.text);
  const foot = made("footer", {}, made("span", {}, answer.done ? figures(answer) : ""));
  const both = turn.answers.length === 2 && turn.answers.every((each) => each.done && each.text.trim());
  if (both && about.collect && turn.answers[0].text.trim() !== turn.answers[1].text.trim()) {
    const words = voted ? "Voted better" : "This one is better";
    foot.append(made("button", {
      type: "button", class: "vote", "aria-pressed": String(voted), "aria-label": `${words}: ${name}`,
      disabled: turn.voted !== null && "", onclick: () => vote(turn, place),
    }, words));
  }
  const article = made("article", { "aria-label": name, "aria-busy": String(!answer.done), class: voted ? "better" : null },
    made("h3", {}, name), said, ...(answer.wrong ? [made("p", { class: "wrong" }, answer.wrong)] : []), foot);
  answer.shown?.isConnected && answer.shown.replaceWith(article);
  Object.defineProperty(answer, "shown", { value: article, writable: true, enumerable: false, configurable: true });
  Object.defineProperty(answer, "place", { value: said, writable: true, enumerable: false, configurable: true });
  return article;
}

function show() {
  find("turns").replaceChildren(...conversation.turns.map((turn) => made("section", { class: "turn" },
    made("p", { class: "question" }, turn.question),
    made("div", { class: turn.answers.length === 2 ? "answers two" : "answers" }, ...turn.answers.map((each) => showAnswer(turn, each))))));
  find("empty").hidden = conversation.turns.length > 0;
  find("talk").scrollTop = find("talk").scrollHeight;
  showState();
}

function showState() {
  find("send").hidden = running !== null;
  find("stop").hidden = running === null;
  for (const id of ["new", "open-history"]) find(id).disabled = running !== null;
}

function showVoices() {
  const names = about.models.map((each) => [each.id, each.id]);
  if (names.length === 2) names.push(["both", "Both"]);
  if (!names.some(([value]) => value === settings.voice)) settings.voice = names.at(-1)?.[0];
  find("voices").toggleAttribute("data-alone", names.length === 1);
  find("voices").replaceChildren(made("legend", { class: "unseen" }, "Who answers"), ...names.map(([value, words]) => made("label", { title: words },
    made("input", { type: "radio", name: "voice", value, checked: value === settings.voice && "", onchange: () => { settings.voice = value; keepSettings(); } }),
    made("span", {}, words))));
}

function showTheme() {
  const dark = settings.theme === "dark" || (settings.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function grow() { // where the browser has no field-sizing
  const text = find("text");
  if (CSS.supports("field-sizing", "content")) return;
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

// Settings and history

const keepSettings = () => write(localStorage, SETTINGS, settings);

function keep() {
  const others = (read(localStorage, HISTORY) ?? []).filter((each) => each.id !== conversation.id);
  write(localStorage, HISTORY, [conversation, ...others].slice(0, MOST_KEPT));
}

function openSettings() {
  for (const id of ["system", "theme"]) find(id).value = settings[id];
  for (const id of ["temperature", "top_p", "max_tokens"]) find(id).value = settings[id] ?? about.defaults[id] ?? "";
  find("max_tokens").max = about.defaults.max_tokens ?? "";
  find("blind").checked = settings.blind;
  find("key").value = sessionStorage.getItem(KEY) ?? "";
  if (!find("settings").open) find("settings").showModal();
}

function closeSettings() {
  settings.system = find("system").value;
  settings.theme = find("theme").value;
  settings.blind = find("blind").checked;
  for (const id of ["temperature", "top_p", "max_tokens"]) {
    const value = find(id).valueAsNumber;
    if (Number.isFinite(value) && value !== about.defaults[id]) settings[id] = value;
    else delete settings[id];
  }
  const key = find("key").value.trim(), before = sessionStorage.getItem(KEY) ?? "";
  if (key !== before) { sessionStorage.setItem(KEY, key); start(); }
  keepSettings();
  showTheme();
}

function askForKey(sentence) {
  openSettings();
  find("key").focus();
  tell(sentence);
}

function openHistory() {
  const kept = read(localStorage, HISTORY) ?? [];
  const row = (each) => made("li", {},
    made("button", { type: "button", onclick: () => { conversation = each; find("history").close(); show(); } }, each.turns[0].question),
    made("button", { type: "button", "aria-label": `Forget: ${each.turns[0].question}`, onclick: () => {
      write(localStorage, HISTORY, kept.filter((other) => other.id !== each.id));
      openHistory();
    } }, "Forget"));
  find("kept").replaceChildren(...(kept.length ? kept.map(row) : [made("li", {}, "Nothing yet.")]));
  find("forget").disabled = !kept.length;
  if (!find("history").open) find("history").showModal();
}

// Start

async function start() {
  try {
    about = await (await ask("/v1/about")).json();
    tell("");
  } catch (error) {
    if (error.status === 401) return askForKey(error.message);
    return tell(`the server cannot be reached: ${error.message}`);
  }
  document.title = `${tuned()} · qlora-dpo`;
  find("empty-votes").hidden = !about.collect;
  showVoices();
  show();
}

find("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
find("text").addEventListener("input", grow);
find("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
find("stop").addEventListener("click", () => running?.abort());
find("new").addEventListener("click", () => { conversation = anew(); show(); find("text").focus(); });
find("open-settings").addEventListener("click", openSettings);
find("open-history").addEventListener("click", openHistory);
find("forget").addEventListener("click", () => { write(localStorage, HISTORY, []); openHistory(); });
find("defaults").addEventListener("click", () => {
  for (const id of ["temperature", "top_p", "max_tokens"]) find(id).value = about.defaults[id];
  find("system").value = "";
});
find("settings").addEventListener("close", closeSettings);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();
start();
