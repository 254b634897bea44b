// What all scripts need of the page.

export const $ = (id) => document.getElementById(id);

export const show = (element, is) => { element.hidden = !is; };

// An element with properties, and with what it holds.
export function made(kind, properties = {}, ...children) {
  const element = Object.assign(document.createElement(kind), properties);
  element.append(...children);
  return element;
}

// The next event of a kind; rejects where there is an error instead.
export function once(target, kind) {
  return new Promise((resolve, reject) => {
    target.addEventListener(kind, resolve, { once: true });
    target.addEventListener("error", () => reject(new Error("the player gave up")), { once: true });
  });
}

export function refuse(message) {
  $("refused").textContent = message;
  show($("refused"), Boolean(message));
}
