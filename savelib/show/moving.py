"""Figures that move: frames under a slider, without a kernel and without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from IPython.display import HTML

from savelib.show.svg import image

SCRIPT = """
(() => {
  const frames = %s, root = document.currentScript.parentElement;
  const picture = root.querySelector("img"), slider = root.querySelector("input");
  const words = root.querySelector("output"), button = root.querySelector("button");
  const show = () => {
    const [label, svg] = frames[slider.value];
    picture.src = "data:image/svg+xml," + encodeURIComponent(svg);
    words.textContent = label;
  };
  let clock = null;
  const stop = () => { clearInterval(clock); clock = null; button.textContent = "play"; };
  button.onclick = () => {
    if (clock) return stop();
    button.textContent = "stop";
    if (+slider.value === frames.length - 1) slider.value = -1;
    clock = setInterval(() => {
      slider.value = +slider.value + 1;
      show();
      if (+slider.value === frames.length - 1) stop();
    }, 250);
  };
  slider.oninput = () => { stop(); show(); };
  slider.parentElement.hidden = false;
})();
"""


def moving(frames: Sequence[tuple[str, str]], alt: str, start: int = 0) -> HTML:
    """A slider over frames (label, SVG). Without scripts the frame `start` is a still picture.

    Each frame is shown as an image: nothing in a drawing can run.
    """
    if not frames:
        return HTML("<p>Not measured in this run.</p>")
    start %= len(frames)
    label, svg = frames[start]
    text = json.dumps([list(frame) for frame in frames]).replace("<", "\\u003c")  # no </script> inside the script
    slider = f'<input type="range" min="0" max="{len(frames) - 1}" value="{start}" style="width:60%;max-width:520px">'
    controls = f'<div hidden><button type="button">play</button> {slider} <output>{html.escape(label)}</output></div>'
    return HTML(f'<div class="moving">{image(svg, alt)}{controls}<script>{SCRIPT % text}</script></div>')
