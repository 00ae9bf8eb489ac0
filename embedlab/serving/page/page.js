// The page of a gallery. Names and texts from the server go into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const asPercent = (share) => `${+(100 * share).toPrecision(2)} %`;
let about = null; // what /api/gallery said
let shown = null; // the image that was asked about: {blob, url, key}
let asked = 0; // only the newest question may change the answer

// ---- talking to the server ----------------------------------------------------------------------------------------

function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function ask(path, options = {}, patience = 4) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await unlock(Boolean(key));
    return ask(path, options, patience);
  }
  if (answer.status === 503 && patience > 0) { // the same request with the same idempotency key
    await new Promise((go) => setTimeout(go, 1000 * (Number(answer.headers.get("Retry-After")) || 1)));
    return ask(path, options, patience - 1);
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.detail || `The server answered ${answer.status}.`);
  }
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();
const post = (path, body, key = newKey()) =>
  json(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", "Idempotency-Key": key } });

let unlocking = null;
function unlock(wrong) {
  sessionStorage.removeItem("key");
  $("key-wrong").hidden = !wrong;
  unlocking ??= new Promise((done) => {
    $("key").value = "";
    $("key-dialog").showModal();
    $("key-dialog").addEventListener("close", () => {
      sessionStorage.setItem("key", $("key").value.trim());
      unlocking = null;
      done();
    }, { once: true });
  });
  return unlocking;
}
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());

// ---- small pieces -------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function picture(address, label) {
  const frame = element("span", "picture", [...label][0]?.toUpperCase() ?? "?");
  frame.setAttribute("aria-hidden", "true");
  if (address) {
    ask(address).then((answer) => answer.blob()).then((blob) => {
      const image = element("img");
      image.alt = "";
      image.src = URL.createObjectURL(blob);
      image.onload = () => URL.revokeObjectURL(image.src);
      frame.replaceChildren(image);
    }).catch(() => {}); // the letter stays
  }
  return frame;
}

let toastTimer = 0;
function toast(text, undo) {
  clearTimeout(toastTimer);
  $("toast-text").textContent = text;
  $("undo").hidden = !undo;
  $("undo").onclick = undo ?? null;
  $("toast").hidden = false;
  if (undo) $("undo").focus(); // by keyboard it is far away, and it stays as long as it has the focus
  else hideToastSoon();
}
function hideToastSoon() {
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 9000);
}
$("undo").onfocus = () => clearTimeout(toastTimer);
$("undo").onblur = hideToastSoon;

function complain(error) {
  $("notice").textContent = error instanceof TypeError ? "The server cannot be reached. Is it running?" : error.message;
  $("notice").hidden = false;
}

async function trying(work, ...buttons) {
  const focused = document.activeElement;
  $("notice").hidden = true;
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    for (const button of buttons) button.disabled = false;
    if (document.activeElement === document.body && focused?.checkVisibility()) focused.focus(); // lost while disabled
  }
}

// ---- asking who it is ---------------------------------------------------------------------------------------------

async function look(blob) {
  if (!blob) return;
  stopCamera();
  const turn = ++asked;
  if (shown) URL.revokeObjectURL(shown.url);
  shown = { blob, url: URL.createObjectURL(blob), key: newKey() };
  $("preview").src = shown.url;
  $("preview").hidden = false;
  $("hint").hidden = true;
  $("answer").hidden = true;
  await identify(turn);
}

async function identify(turn = ++asked) {
  await trying(async () => {
    if (about && shown.blob.size > about.max_body) {
      throw new Error(`The image has ${(shown.blob.size / 1e6).toFixed(1)} MB; the server takes ${about.max_body / 1e6} MB.`);
    }
    $("drop").classList.add("busy");
    try {
      const found = await json("api/identify?k=5", { method: "POST", body: shown.blob, headers: { "Content-Type": "application/octet-stream" } });
      if (turn !== asked) return;
      showAnswer(found);
    } finally {
      if (turn === asked) $("drop").classList.remove("busy");
    }
    if (about?.inbox_days) await loadStrangers();
  });
}

function showAnswer(found) {
  const known = found.label !== null;
  const empty = found.score === null;
  const words = empty ? ["Nobody enrolled", "Nobody to compare with", "Enroll a first image below."]
    : !found.calibrated ? ["Not calibrated", "No decision", "The gallery has no threshold yet: run “embedlab gallery calibrate” with images of strangers. The nearest are shown below."]
    : known ? ["Known", found.label, "The score reaches the threshold."]
    : ["Stranger", "Unknown", "The score of the best identity stays below the threshold."];
  $("answer").classList.toggle("known", known);
  [$("verdict").textContent, $("decision").textContent, $("explanation").textContent] = words;
  $("scale").hidden = empty;
  if (!empty) drawScale(found.score, found.threshold);
  $("neighbours").replaceChildren(...found.neighbours.map((near) => {
    const item = element("li");
    const who = element("span", "who", near.label);
    who.dir = "auto";
    who.title = near.label;
    item.append(picture(near.thumbnail, near.label), who, element("span", "score", near.score.toFixed(3)));
    return item;
  }));
  $("neighbours").previousElementSibling.hidden = found.neighbours.length === 0;
  $("name").value = known ? found.label : "";
  $("enroll").hidden = Boolean(about?.read_only);
  $("answer").hidden = false;
  if (innerWidth < 860) $("answer").scrollIntoView({ block: "nearest" });
}

function drawScale(score, threshold) {
  const low = Math.min(0, Math.floor(score)); // 0 to 1 for cosines; normalised scores go beyond
  const high = Math.max(1, Math.ceil(score), Math.ceil(threshold ?? 1));
  const place = (value) => `${(100 * (value - low)) / (high - low)}%`;
  const text = (className, value, label) => {
    const made = element("span", className, label);
    made.style.left = place(value);
    const share = parseFloat(place(value));
    if (share < 14) made.classList.add("at-start");
    if (share > 86) made.classList.add("at-end");
    return made;
  };
  const track = element("div", "track");
  const parts = [track];
  if (threshold !== null) {
    const pass = element("div", "pass");
    pass.style.left = place(threshold);
    track.append(pass);
    const limit = element("div", "limit");
    limit.style.left = place(threshold);
    parts.push(limit, text("under-mark", threshold, `threshold ${threshold.toFixed(3)}`));
  }
  const mark = element("div", "mark");
  mark.style.left = place(score);
  parts.push(mark, text("over-mark", score, `score ${score.toFixed(3)}`));
  $("scale").replaceChildren(...parts);
  $("scale").setAttribute("aria-label", `Score ${score.toFixed(3)}` + (threshold === null ? ", no threshold" : `, threshold ${threshold.toFixed(3)}`));
}

$("choose").onclick = () => $("file").click();
$("file").onchange = () => { look($("file").files[0]); $("file").value = ""; };
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  look([...event.dataTransfer.files].find((file) => file.type.startsWith("image/")));
});
document.addEventListener("paste", (event) => {
  const image = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
  if (image) { event.preventDefault(); look(image); }
});

// ---- the camera ---------------------------------------------------------------------------------------------------

let stream = null;
function cameraButtons(on) {
  for (const id of ["video", "shoot", "cancel-camera"]) $(id).hidden = !on;
  $("choose").hidden = on;
  $("camera").hidden = on || !navigator.mediaDevices;
}
function stopCamera() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  cameraButtons(false);
}
$("camera").onclick = () => trying(async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: { ideal: "environment" } } });
  } catch {
    throw new Error("The camera cannot be used: allow it for this page, or choose a file.");
  }
  $("video").srcObject = stream;
  $("preview").hidden = $("hint").hidden = true;
  cameraButtons(true);
  $("shoot").focus();
  await $("video").play();
}, $("camera"));
$("shoot").onclick = () => {
  const canvas = element("canvas");
  canvas.width = $("video").videoWidth;
  canvas.height = $("video").videoHeight;
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  canvas.toBlob(look, "image/jpeg", 0.92);
};
$("cancel-camera").onclick = () => {
  stopCamera();
  $("preview").hidden = !shown;
  $("hint").hidden = Boolean(shown);
  $("camera").focus();
};

// ---- enrolling and removing ---------------------------------------------------------------------------------------

$("enroll").onsubmit = (event) => {
  event.preventDefault();
  const image = shown;
  trying(async () => {
    const form = new FormData();
    form.append("label", $("name").value.trim());
    form.append("image", image.blob, "image");
    // one key until it has succeeded: pressing again after a lost answer adds nothing twice
    const made = await json("api/enroll", { method: "POST", body: form, headers: { "Idempotency-Key": image.key } });
    image.key = newKey();
    toast(`Enrolled as ${made.label}`, () => trying(async () => {
      await post("api/remove", { ids: [made.id] });
      toast("Taken back");
      await refresh();
      $("choose").focus();
    }, $("undo")));
    await refresh();
  }, event.submitter);
};
$("name").oninput = () => { if (shown) shown.key = newKey(); }; // another name is another request

function confirmed(title, text) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
  return new Promise((done) => {
    // a late event of the dialog before this one finds it open and is no answer
    $("confirm").onclose = () => { if (!$("confirm").open) done($("confirm").returnValue === "yes"); };
  });
}

async function remove(identity, button) {
  const pictures = identity.templates === 1 ? "Its template is" : `Its ${identity.templates} templates are`;
  if (!(await confirmed(`Remove ${identity.label}?`, `${pictures} erased from the gallery. This cannot be undone.`))) return;
  await trying(async () => {
    await post("api/remove", { label: identity.label });
    toast(`Removed ${identity.label}`);
    await refresh();
    $($("filter").hidden ? "choose" : "filter").focus();
  }, button);
}

// ---- who is enrolled ----------------------------------------------------------------------------------------------

let listed = [];
let next = null;

async function loadIdentities(more = false) {
  const part = await json(`api/identities?limit=200${more ? `&after=${encodeURIComponent(next)}` : ""}`);
  listed = more ? [...listed, ...part.identities] : part.identities;
  next = part.next;
  $("total").textContent = part.total;
  $("nobody").hidden = part.total > 0;
  $("filter").hidden = part.total < 6;
  $("more").hidden = next === null;
  $("labels").replaceChildren(...listed.map((identity) => { const option = element("option"); option.value = identity.label; return option; }));
  $("identities").replaceChildren(...listed.map(identityRow));
  filter();
}

function identityRow(identity) {
  const item = element("li");
  const who = element("span", "who", identity.label);
  who.dir = "auto";
  who.append(element("small", "", identity.templates === 1 ? "1 template" : `${identity.templates} templates`));
  item.append(picture(identity.thumbnail, identity.label), who);
  if (!about.read_only) {
    const button = element("button", "plain", "Remove");
    button.setAttribute("aria-label", `Remove ${identity.label}`);
    button.onclick = () => remove(identity, button);
    item.append(button);
  }
  return item;
}

function filter() {
  const wanted = $("filter").value.toLowerCase();
  [...$("identities").children].forEach((item, row) => { item.hidden = !listed[row].label.toLowerCase().includes(wanted); });
}
$("filter").oninput = filter;
$("more").onclick = () => trying(() => loadIdentities(true), $("more"));

// ---- the operating curve ------------------------------------------------------------------------------------------

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawCurve() {
  $("curve-card").hidden = about.curve.length < 2;
  if (about.curve.length < 2) return;
  const [width, height, left, right, top, bottom] = [440, 220, 40, 8, 14, 34];
  const thresholds = about.curve.map((point) => point.threshold);
  const low = Math.min(...thresholds, about.threshold), high = Math.max(...thresholds, about.threshold);
  const x = (value) => left + ((width - left - right) * (value - low)) / (high - low || 1);
  const y = (value) => top + (height - top - bottom) * (1 - value);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Rates over the threshold; the threshold is ${about.threshold}` });
  for (const rate of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(rate), y2: y(rate), class: "grid" }));
    svg.append(drawn("text", { x: left - 6, y: y(rate) + 4, "text-anchor": "end" }, `${100 * rate} %`));
  }
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const value = low + part * (high - low);
    svg.append(drawn("text", { x: x(value), y: height - 16, "text-anchor": part === 0 ? "start" : part === 1 ? "end" : "middle" }, value.toFixed(high - low < 0.1 ? 3 : 2)));
  }
  svg.append(drawn("text", { x: (left + width - right) / 2, y: height - 2, "text-anchor": "middle" }, "threshold"));
  const lines = [["bound", "upper confidence bound of that"], ["fpir", "strangers taken for somebody"], ["detection", "enrolled people named right"]];
  const legend = [];
  for (const [name, words] of lines) {
    const points = about.curve.filter((point) => point[name] !== null);
    if (points.length < 2) continue;
    svg.append(drawn("polyline", { class: `line ${name}`, points: points.map((point) => `${x(point.threshold)},${y(point[name])}`).join(" ") }));
    legend.unshift([name, words]);
  }
  svg.append(drawn("line", { x1: x(about.threshold), x2: x(about.threshold), y1: top - 6, y2: height - bottom, class: "now" }));
  legend.push(["now-key", `the threshold, ${about.threshold.toFixed(3)}`]);
  $("curve").replaceChildren(svg);
  $("legend").replaceChildren(...legend.map(([name, words]) => {
    const item = element("li");
    item.append(element("i", name), element("span", "", words));
    return item;
  }));
}

// ---- strangers ----------------------------------------------------------------------------------------------------

async function loadStrangers() {
  const inbox = await json("api/inbox");
  $("strangers").hidden = false;
  $("strangers-note").textContent = inbox.clusters.length
    ? `Unknown images are kept for ${inbox.days} days. Those that look alike stand together.`
    : `Nobody unknown was seen in the last ${inbox.days} days.`;
  $("clusters").replaceChildren(...inbox.clusters.slice(0, 30).map(clusterRow));
}

function clusterRow(cluster) {
  const item = element("li");
  const pictures = element("div", "pictures");
  pictures.append(...cluster.pictures.map((address) => picture(address, "?")));
  const form = element("form");
  const row = element("div", "row");
  const name = element("input");
  name.required = true;
  name.maxLength = 1000;
  name.placeholder = "Name";
  name.setAttribute("list", "labels");
  name.setAttribute("aria-label", `Name of the stranger in ${cluster.ids.length} images`);
  const enroll = element("button", "primary", "Enroll");
  const dismiss = element("button", "", "Dismiss");
  dismiss.type = "button";
  row.append(name, enroll, dismiss);
  form.append(row);
  form.onsubmit = (event) => {
    event.preventDefault();
    trying(async () => {
      await post("api/inbox/name", { ids: cluster.ids.slice(0, 1000), label: name.value.trim() });
      toast(`Enrolled ${cluster.ids.length} as ${name.value.trim()}`);
      await refresh();
      $("strangers").focus();
    }, enroll);
  };
  dismiss.onclick = () => trying(async () => {
    await post("api/inbox/dismiss", { ids: cluster.ids.slice(0, 1000) });
    await loadStrangers();
    $("strangers").focus();
  }, dismiss);
  const images = cluster.ids.length === 1 ? "1 image" : `${cluster.ids.length} images`;
  item.append(pictures, element("p", "quiet", `${images}, last ${new Date(1000 * cluster.seen).toLocaleString()}`), form);
  return item;
}

// ---- start --------------------------------------------------------------------------------------------------------

async function refresh() {
  about = await json("api/gallery");
  const parts = [
    about.identities === 1 ? "1 identity" : `${about.identities} identities`,
    about.templates === 1 ? "1 template" : `${about.templates} templates`,
    about.calibrated ? `at most ${asPercent(about.fpir)} of strangers named` : "not calibrated",
  ];
  if (about.read_only) parts.push("read-only");
  $("summary").textContent = parts.join(" · ");
  if (about.calibrated) {
    const grown = about.stale ? " The gallery has outgrown this promise since: calibrate again." : "";
    $("promise").textContent = `With ${asPercent(about.confidence)} confidence at most ${asPercent(about.fpir)} of strangers are taken for somebody.${grown}`;
  }
  drawCurve();
  await loadIdentities();
  if (about.inbox_days) await loadStrangers();
}

cameraButtons(false);
trying(refresh);
