"use strict";
// The list of questions: what the filter leaves, sorted, a page at a time. All texts get into the page as text.

const PAGE = 50;
// Whether a question stays: `now` and `before` say if the checkpoint, and the one it is compared with, are right.
const OUTCOMES = {
  any: () => true,
  right: (now) => now,
  wrong: (now) => !now,
  changed: (now, before) => now !== before,
  gained: (now, before) => now && !before,
  lost: (now, before) => !now && before,
};
const collator = new Intl.Collator("en", { numeric: true });

function textOf({ id, kind, question, choices, answers }) {
  const said = answers.flatMap(([answer, , whole]) => [answer, whole]);
  return [id, kind, question, ...choices, ...said].join("\n").toLowerCase();
}
const countRight = (question) => question.answers.filter((answer) => answer[1]).length;
const valueOf = (question, key, checkpoint) =>
  key === "said" ? question.answers[checkpoint][0] : key === "rights" ? countRight(question) : question[key];

function select(questions, filter) {
  const text = filter.text.trim().toLowerCase();
  const left = questions.filter((question) =>
    (filter.task === "" || question.task === filter.task) &&
    OUTCOMES[filter.outcome](question.answers[filter.checkpoint][1], question.answers[filter.before][1]) &&
    (text === "" || (question.searched ??= textOf(question)).includes(text)));
  const values = new Map(left.map((question) => [question, valueOf(question, filter.key, filter.checkpoint)]));
  const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b)) * (filter.down ? -1 : 1);
  return left.sort((a, b) => compare(values.get(a), values.get(b)) || a.number - b.number);
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const isolated = (text) => make("bdi", {}, text);
const verdict = (right) => make("span", { className: right ? "right" : "wrong" }, right ? "✓ right" : "✗ wrong");

function showClip({ clip, note }) {
  const player = clip && make("audio", { controls: true, preload: "none", src: clip });
  const link = clip.startsWith("./") && make("a", { href: clip }, "the clip's file");
  return [player, link, note && make("p", { className: "missing" }, isolated(note))].filter(Boolean);
}

function showDetail(question, names) {
  const answers = question.answers.flatMap(([answer, right, whole, cut], index) => {
    const said = make("dd", {}, verdict(right), " ", isolated(answer), cut ? " (cut off at the token limit)" : "");
    if (whole) said.append(make("pre", { dir: "auto", tabIndex: 0 }, whole));
    return [make("dt", {}, isolated(names[index])), said];
  });
  const choices = question.choices.map((choice) => make("li", {}, isolated(choice)));
  const about = [question.id, question.task, question.kind].filter(Boolean).join(" · ");
  const cell = make("td", { colSpan: 6 }, make("p", { className: "kind" }, isolated(about)), ...showClip(question));
  cell.append(make("ul", {}, ...choices), make("p", {}, "Right is: ", isolated(question.answer)));
  cell.append(make("dl", {}, ...answers));
  return make("tr", { className: "detail" }, cell);
}

function showRow(question, names, checkpoint) {
  const button = make("button", { className: "open", ariaExpanded: "false" }, isolated(question.question));
  const [said, right] = question.answers[checkpoint];
  const cells = { number: question.number, question: button, task: isolated(question.task),
    answer: isolated(question.answer), said: make("span", {}, verdict(right), " ", isolated(said)),
    rights: `${countRight(question)} of ${names.length}` };
  const row = make("tr", {}, ...Object.entries(cells).map(([className, child]) => make("td", { className }, child)));
  button.addEventListener("click", () => {
    const open = button.ariaExpanded === "true";
    button.ariaExpanded = String(!open);
    open ? row.nextSibling.remove() : row.after(showDetail(question, names));
  });
  return row;
}

function start() {
  const { sets } = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const order = { key: "number", down: false, page: 0 };
  const fill = (id, texts, values = [...texts.keys()]) =>
    find(id).replaceChildren(...texts.map((text, index) => make("option", { value: values[index] }, text)));

  function chooseSet(number) {
    const { names, questions } = sets[number];
    const tasks = [...new Set(questions.map((question) => question.task))].sort(collator.compare);
    find("set").value = number;
    fill("task", ["all", ...tasks], ["", ...tasks]);
    fill("checkpoint", names);
    fill("before", names);
    find("checkpoint").value = names.length - 1;
  }

  function show() {
    const { names, questions } = sets[find("set").value];
    const filter = { ...order };
    for (const id of ["text", "task", "checkpoint", "outcome", "before"]) filter[id] = find(id).value;
    const left = select(questions, filter);
    const pages = Math.max(1, Math.ceil(left.length / PAGE));
    order.page = Math.min(order.page, pages - 1);
    const rows = left.slice(order.page * PAGE, (order.page + 1) * PAGE)
      .map((question) => showRow(question, names, filter.checkpoint));
    document.querySelector("#list tbody").replaceChildren(...rows);
    find("before").disabled = !["changed", "gained", "lost"].includes(filter.outcome);
    find("count").textContent = `${left.length} of ${questions.length} questions`;
    find("page").textContent = `page ${order.page + 1} of ${pages}`;
    find("previous").disabled = order.page === 0;
    find("next").disabled = order.page === pages - 1;
  }

  function restart(changes) {
    Object.assign(order, { page: 0 }, changes);
    show();
  }

  function sortBy(button) {
    const { key } = button.dataset;
    restart({ key, down: order.key === key && !order.down });
    for (const other of document.querySelectorAll("#list th")) other.ariaSort = "none";
    button.parentElement.ariaSort = order.down ? "descending" : "ascending";
  }

  function showChanges(button) {
    const { set, from, to } = button.dataset;
    chooseSet(set);
    const filter = { text: "", task: "", outcome: "changed", before: from, checkpoint: to };
    for (const id in filter) find(id).value = filter[id];
    restart();
    find("text").focus();
  }

  fill("set", sets.map((set) => set.title));
  find("set").parentElement.hidden = sets.length === 1;
  chooseSet(0);
  find("set").addEventListener("input", (event) => chooseSet(event.target.value));
  find("filter").addEventListener("input", () => restart());
  const onClick = (buttons, act) =>
    document.querySelectorAll(buttons).forEach((button) => button.addEventListener("click", () => act(button)));
  onClick("#list th button", sortBy);
  onClick(".changes", showChanges);
  onClick("#previous", () => restart({ page: order.page - 1 }));
  onClick("#next", () => restart({ page: order.page + 1 }));
  restart();
}

if (typeof document !== "undefined") start();
