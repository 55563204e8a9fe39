// Plays every clip in step, says on the root element how many decoded and play, and offers pause and slow motion.
const root = document.documentElement;
const videos = [...document.querySelectorAll("video")];
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
let settled = 0, decoded = 0;

function settle(ok) {
  settled += 1;
  decoded += ok ? 1 : 0;
  root.dataset.videos = `${decoded} of ${videos.length}`;
  if (settled === videos.length) {
    root.dataset.settled = "true";
    if (!calm) play();
  }
}
function play() {
  for (const video of videos) {
    video.currentTime = 0;
    video.play().catch(() => {});
  }
}
const moving = new Set();
for (const video of videos) {
  for (const [event, moves] of [["playing", true], ["pause", false], ["error", false]]) {
    video.addEventListener(event, () => {
      moving[moves ? "add" : "delete"](video);
      root.dataset.playing = moving.size;
    });
  }
}
root.dataset.videos = `0 of ${videos.length}`;
if (!videos.length) root.dataset.settled = "true";
for (const video of videos) {
  if (video.readyState >= 2) settle(video.videoWidth > 0);
  else {
    video.addEventListener("loadeddata", () => settle(video.videoWidth > 0), { once: true });
    video.addEventListener("error", () => settle(false), { once: true });
    video.load();
  }
}

const pause = document.getElementById("pause");
const slow = document.getElementById("slow");
let playing = !calm;
function label() {
  if (pause) pause.textContent = playing ? "Pause" : "Play";
}
label();
pause?.addEventListener("click", () => {
  playing = !playing;
  if (playing) play();
  else videos.forEach((video) => video.pause());
  label();
});
slow?.addEventListener("click", () => {
  const on = slow.getAttribute("aria-pressed") !== "true";
  slow.setAttribute("aria-pressed", String(on));
  videos.forEach((video) => (video.playbackRate = on ? 0.33 : 1));
});
