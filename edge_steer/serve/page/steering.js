// What a dial's number means: how it is written, what it tends to, whether it is within what was found safe.

export const signed = (value) => {
  const text = String(Math.abs(Number(value.toFixed(2))));
  return value > 0 && text !== "0" ? `+${text}` : value < 0 && text !== "0" ? `−${text}` : text;
};

/** `value` as people read it: "+4.1°", "−0.5", "off". */
export function shown(steering, value) {
  if (value === null || value === undefined) return "off";
  if (isSwitch(steering)) return "on";
  return signed(value) + (steering?.unit === "degrees" ? "°" : "");
}

/** The same for a screen reader. */
export function spokenValue(steering, value) {
  if (value === null) return "off";
  const unit = steering.unit === "degrees" ? " degrees" : "";
  const name = value > 0 ? steering.positive_name : value < 0 ? steering.negative_name : "";
  const warning = beyond(steering, value) ? ", beyond the safe range" : "";
  return `${Number(value.toFixed(2))}${unit}${name ? `, ${name}` : ""}${warning}`;
}

/** The largest number that the server takes, either way. */
export const most = (steering) => (steering.unit === "degrees" ? 360 : 1000);

/** `ablation` has no number: it is on or off. */
export const isSwitch = (steering) => steering?.operator === "ablation";

/** The position that the server would start with. */
export const firstDial = (steering) => ({
  on: steering.default !== null,
  value: steering.default ?? steering.file_default ?? (isSwitch(steering) ? 1 : 0),
});

/** Whether `value` lies outside the range that was found safe; false where none is known. */
export function beyond(steering, value) {
  if (value === null || isSwitch(steering)) return false;
  const { min, max } = steering;
  return (max !== null && value > max + 1e-6) || (min !== null && value < min - 1e-6);
}

/** How far the slider reaches on either side: well beyond the safe range, and as far as the present number. */
export function reach(steering, value = 0) {
  const ends = [steering.min, steering.max].filter((end) => end !== null).map(Math.abs);
  const safe = Math.max(...ends, 0);
  const known = Math.max(Math.abs(steering.default ?? 0), Math.abs(steering.file_default ?? 0));
  const unmeasured = Math.max(known * 2, steering.unit === "degrees" ? 12 : 2);
  return Math.max(roundUp(safe > 0 ? safe * 1.5 : unmeasured), roundUp(Math.abs(value)));
}

/** The slider's step: at most a hundredth of its reach, as 1, 2 or 5. */
export function step(far) {
  const raw = far / 200;
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 5].find((digit) => digit * power >= raw) ?? 10);
}

function roundUp(far) {
  if (far === 0) return 0;
  const unit = 10 ** (Math.floor(Math.log10(far)) - 1);
  return Number((Math.ceil(far / unit - 1e-9) * unit).toPrecision(6));
}

/** Where the dials stand together, −1…1: the one that is turned furthest, as a share of its safe range. */
export function tone(steerings, dials) {
  let furthest = 0;
  for (const each of steerings) {
    const value = dials[each.name];
    if (value === null || value === undefined || isSwitch(each)) continue;
    const end = Math.abs((value >= 0 ? each.max : each.min) ?? reach(each) / 1.5) || 1;
    const share = Math.max(-1, Math.min(1, value / end));
    if (Math.abs(share) > Math.abs(furthest)) furthest = share;
  }
  return furthest;
}
