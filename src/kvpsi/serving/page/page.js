"use strict";

const MIB = 1024 * 1024;
const byId = (id) => document.getElementById(id);
const messages = [];
let answering = null;

function headers() {
  const key = sessionStorage.getItem("kvpsi-key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function askForKey() {
  const dialog = byId("login");
  if (dialog.open) return;
  byId("wrong").hidden = !sessionStorage.getItem("kvpsi-key");
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  sessionStorage.setItem("kvpsi-key", byId("key").value);
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes, unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(unit > 1 && Math.abs(value) < 100 ? 1 : 0)} ${units[unit]}`;
}

function line(name, x, y) {
  return { name, x, y, mode: "lines", line: { width: 2 } };
}

function draw(id, lines, top) {
  if (!window.Plotly) return;
  const ink = getComputedStyle(document.body).color;
  const layout = {
    margin: { l: 44, r: 8, t: 4, b: 24 }, showlegend: lines.length > 1, legend: { orientation: "h", y: 1.2 },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: ink, size: 11 },
    xaxis: { type: "date", nticks: 4, fixedrange: true, tickformat: "%H:%M:%S" },
    yaxis: { rangemode: "tozero", fixedrange: true, ...(top ? { range: [0, top] } : {}) },
  };
  Plotly.react(id, lines, layout, { displayModeBar: false, responsive: true });
}

function show(status, series, events) {
  byId("model").textContent = status.model;
  const state = byId("state");
  state.textContent = status.governed ? `governed: ${status.reason}` : `not governed: ${status.reason}`;
  state.className = status.governed ? "" : "bad";
  byId("memory_pressure").textContent = `${(100 * status.memory_pressure).toFixed(1)} %`;
  byId("headroom").textContent = size(status.headroom_bytes);
  const cache = status.resident_bytes, saved = status.sessions_bytes, parked = status.sessions_parked;
  byId("memory").textContent = `${size(cache + saved)} of ${size(status.capacity_bytes)}`;
  const due = status.all_may_hold_bytes
    ? `; share ${size(status.may_hold_bytes)} of ${size(status.all_may_hold_bytes)}, weight ${status.share_weight} of ${status.all_shares_weight}`
    : "";
  byId("parts").textContent = `memory of conversations (cache ${size(cache)}, saved ${size(saved)}${due})`;
  byId("speed").textContent = status.tokens_per_second.toFixed(1);
  byId("requests").textContent = `${status.running} / ${status.waiting}`;
  byId("threads").textContent = `${status.threads} / ${status.concurrency_limit}`;
  byId("threads").parentElement.title = `${status.threads_reason}; ${status.admission_reason}`;
  byId("sessions").textContent = `${status.sessions - parked} (${size(saved)})`;
  const files = parked ? `, parked ${parked} (${size(status.parked_bytes)} on disk)` : "";
  byId("parked").textContent = `saved conversations${files}`;
  const x = series.time_s.map((t) => new Date(1000 * t));
  const scaled = (name, by) => series[name].map((v) => v * by);
  const most = Math.max(5, ...scaled("memory_pressure", 100), ...scaled("cpu_pressure", 100));
  draw("chart-pressure", [
    line("memory", x, scaled("memory_pressure", 100)), line("processors", x, scaled("cpu_pressure", 100)),
  ], most);
  draw("chart-memory", [
    line("cache", x, scaled("resident_bytes", 1 / MIB)), line("limit", x, scaled("limit_bytes", 1 / MIB)),
    line("saved", x, scaled("sessions_bytes", 1 / MIB)),
  ]);
  draw("chart-headroom", [line("headroom", x, scaled("headroom_bytes", 1 / MIB))]);
  draw("chart-speed", [line("tokens a second", x, series.tokens_per_second)]);
  draw("chart-requests", [
    line("answering", x, series.running), line("waiting", x, series.waiting),
    line("limit", x, series.concurrency_limit), line("threads", x, series.threads),
  ]);
  byId("events").replaceChildren(...events.slice().reverse().map((event) => {
    const item = document.createElement("li"), when = document.createElement("time");
    when.textContent = new Date(1000 * event.time_s).toLocaleTimeString("en-GB");
    item.append(when, event.times > 1 ? `${event.text} (${event.times} times)` : event.text);
    return item;
  }));
}

async function look() {
  try {
    const response = await fetch("v1/kvpsi/history", { headers: headers(), cache: "no-store" });
    if (response.status === 401) await askForKey();
    else if (response.ok) { const told = await response.json(); show(told.status, told.series, told.events); }
    else throw new Error((await response.json()).error.message);
  } catch (error) {
    byId("state").textContent = `no answer: ${error.message}`;
    byId("state").className = "bad";
  }
  setTimeout(look, document.hidden ? 5000 : 1000);
}

function say(role, text) {
  const paragraph = document.createElement("p");
  paragraph.className = role;
  paragraph.textContent = text;
  byId("chat").append(paragraph);
  paragraph.scrollIntoView({ block: "nearest" });
  return paragraph;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function answer(question) {
  messages.push({ role: "user", content: question });
  say("user", question);
  const shown = say("assistant", "");
  answering = new AbortController();
  byId("send").textContent = "Stop";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal: answering.signal,
      body: JSON.stringify({ messages, stream: true, max_tokens: 512 }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      shown.textContent += event.choices[0]?.delta.content ?? "";
      shown.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message);
  }
  if (shown.textContent) messages.push({ role: "assistant", content: shown.textContent });
  else { messages.pop(); shown.remove(); }
  answering = null;
  byId("send").textContent = "Send";
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (answering) answering.abort();
  else if (question) { byId("question").value = ""; answer(question); }
});
look();
