// A column of numbers starts with the largest, one of text with A; a second
// click turns it round. Rows without a value stay last. Buttons are made here,
// so that without JavaScript no head pretends to do something.
'use strict';
const value = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent;
  return text === '' || Number.isNaN(Number(text)) ? text : Number(text);
};
const compare = (a, b) => typeof a === 'number' && typeof b === 'number'
  ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true});
const sort = (body, column, sign) => {
  const rows = [...body.rows];
  const missing = row => value(row, column) === '';
  rows.sort((a, b) => missing(a) - missing(b)
    || sign * compare(value(a, column), value(b, column)));
  body.append(...rows);
};
for (const table of document.querySelectorAll('table.sorts')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    const number = head.classList.contains('number');
    const orders = ['ascending', 'descending'];
    const first = orders[Number(number)], second = orders[Number(!number)];
    button.addEventListener('click', () => {
      const now = head.getAttribute('aria-sort');
      const order = now === first ? second : first;
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', order);
      sort(body, column, order === 'ascending' ? 1 : -1);
    });
  });
}
