/** Lists and tables that change under the reader's hands: focus, selection and scroll position stay where they are. */

const FOCUSABLE = "a[href], button, input, [tabindex]";

/**
 * Make the children of an element show the items, in their order, with the element that each item had before.
 * @template Item
 * @param {Element} parent
 * @param {Item[]} items
 * @param {object} options
 * @param {(item: Item) => string} options.key
 * @param {(item: Item) => Element} options.create make the element of an item that is new
 * @param {(element: any, item: Item) => void} options.update show the item in its element
 */
export function updateChildren(parent, items, { key, create, update }) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const children = items.map((item) => {
    const child = old.get(key(item)) ?? create(item);
    old.delete(key(item));
    child.dataset.key = key(item);
    update(child, item);
    return child;
  });
  for (const child of old.values()) remove(child);
  arrange(parent, children);
}

/** Remove an element; if it holds the focus, its neighbour gets it, on the same control. */
function remove(element) {
  const index = [...element.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement);
  const neighbour = element.nextElementSibling ?? element.previousElementSibling;
  element.remove();
  if (index >= 0) neighbour?.querySelectorAll(FOCUSABLE)[index]?.focus({ preventScroll: true });
}

/** Put the children in order. The one that the reader uses is not moved: moving it would lose focus and selection. */
function arrange(parent, children) {
  const pinned = children.find((child) => isInUse(child));
  let next = parent.firstElementChild;
  for (const child of children) {
    if (child === pinned) {
      while (next !== pinned) {
        const early = next;
        next = next.nextElementSibling;
        parent.append(early);
      }
    }
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
  }
}

function isInUse(element) {
  const selection = getSelection();
  return (
    element.contains(document.activeElement) ||
    (selection !== null && !selection.isCollapsed && element.contains(selection.anchorNode))
  );
}
