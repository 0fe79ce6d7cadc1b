// What a text says that another one does not: words beside their longest common subsequence.

const MAX_CELLS = 4_000_000; // words of one times words of the other, above which nothing is marked

// Pieces of `text` in order, each with whether `other` has it at this place; null where the texts are too long.
export function differences(text, other) {
  const mine = text.match(/\s+|\S+/g) || [];
  const theirs = other.match(/\S+/g) || [];
  const words = mine.filter((piece) => piece.trim());
  if (words.length * theirs.length > MAX_CELLS) return null;
  const width = theirs.length + 1;
  const length = new Uint16Array((words.length + 1) * width); // of the common subsequence from here on
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = theirs.length - 1; j >= 0; j--)
      length[i * width + j] = words[i] === theirs[j] ? length[(i + 1) * width + j + 1] + 1 : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
  const out = [];
  const add = (piece, same) => {
    const last = out[out.length - 1];
    if (last && last.same === same) last.text += piece;
    else out.push({ text: piece, same });
  };
  let [i, j, space] = [0, 0, ""];
  for (const piece of mine) {
    if (!piece.trim()) {
      space = piece;
      continue;
    }
    while (j < theirs.length && words[i] !== theirs[j] && length[i * width + j + 1] >= length[(i + 1) * width + j]) j++;
    const same = j < theirs.length && words[i] === theirs[j];
    add(space, same || out.length === 0 || out[out.length - 1].same); // marked only between two marked words
    add(piece, same);
    space = "";
    i++;
    if (same) j++;
  }
  add(space, true);
  return out;
}
