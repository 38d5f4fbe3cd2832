"""A figure that readers step through with a slider: no kernel, no widget manager, no network.

The frames are drawn beforehand and travel inside the page as pictures. A few lines of script in the
slider show one of them at a time, so the same output works in Jupyter, on Colab, on the built page
and from a zip. Where scripts are off, one frame stands alone as a picture.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

# Both scripts find their figure from the element that was touched, so no id is needed: several
# steppers may share a page, and drawing one again gives the same text, byte for byte.
_SHOW = """
const figure = this.closest('figure'), step = +this.value;
figure.querySelectorAll('[data-frame]').forEach((frame, i) => { frame.hidden = i !== step; });
this.setAttribute('aria-valuetext', figure.querySelectorAll('figcaption')[step].textContent);
"""
_PLAY = """
const figure = this.closest('figure'), slider = figure.querySelector('input');
const stop = () => {
  clearInterval(figure.timer); figure.timer = 0; this.textContent = '\u25b6\ufe0e';
  this.setAttribute('aria-label', 'Play');
};
if (figure.timer) { stop(); return; }
if (slider.value === slider.max) { slider.value = 0; slider.oninput(); }
figure.timer = setInterval(() => {
  slider.stepUp(); slider.oninput();
  if (slider.value === slider.max) stop();
}, 700);
this.textContent = '\u275a\u275a'; this.setAttribute('aria-label', 'Pause');
"""
# The controls appear once a picture has loaded, that is, only where scripts run.
_READY = "this.closest('figure').querySelector('[data-controls]').style.display = 'flex';"


class Stepper:
    """Pictures under one slider. Made by ``stepper``; notebooks display it by themselves.

    >>> import matplotlib.pyplot as plt
    >>> shown = stepper([plt.figure(figsize=(1, 1))], ["An empty figure"], label="epoch")
    >>> len(shown.pictures), shown.alts
    (1, ('An empty figure',))
    """

    def __init__(
        self,
        pictures: Sequence[bytes],
        alts: Sequence[str],
        captions: Sequence[str],
        label: str,
        start: int = 0,
    ) -> None:
        self.pictures = tuple(pictures)
        self.alts = tuple(alts)
        self.captions = tuple(captions)
        self.label = label
        self.start = start

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"Stepper({len(self)} frames, label={self.label!r}): {self.alts[self.start]}"

    def _repr_html_(self) -> str:
        frames = "\n".join(self._frame(i) for i in range(len(self)))
        return (
            f'<figure class="modlib-stepper" role="group" aria-label="{escape(self.label)}">\n'
            '<div data-controls style="display:none; gap:.6em; align-items:center">\n'
            f'<button type="button" aria-label="Play" onclick="{escape(_PLAY)}">'
            "\u25b6\ufe0e</button>\n"
            f'<label style="display:contents">{escape(self.label)} <input type="range" min="0" '
            f'max="{len(self) - 1}" step="1" value="{self.start}" style="flex:1; min-width:0" '
            f'aria-valuetext="{escape(self.captions[self.start])}" oninput="{escape(_SHOW)}">'
            f"</label>\n</div>\n{frames}\n</figure>"
        )

    def _frame(self, i: int) -> str:
        data = base64.b64encode(self.pictures[i]).decode()
        shown = i == self.start
        ready = f' onload="{escape(_READY)}"' if shown else ""
        return (
            f"<div data-frame{'' if shown else ' hidden'}>"
            f'<img style="max-width:100%; background:white" alt="{escape(self.alts[i])}"'
            f'{ready} src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(self.captions[i])}</figcaption></div>"
        )


def stepper(
    frames: Iterable[Figure | bytes],
    alts: Sequence[str],
    *,
    label: str,
    captions: Sequence[str] | None = None,
    start: int = 0,
    dpi: int = 144,
) -> Stepper:
    """Put frames under a slider that works with or without a kernel.

    Args:
        frames: Matplotlib figures or PNG bytes, all of one size. A generator is drawn one frame at
            a time; each figure is closed once it is a picture.
        alts: for each frame, what a reader who cannot see it needs to know.
        label: the name of what the slider changes, with its unit: "epoch", "batch size".
        captions: for each frame, the line under it, by default its description (``alts``).
            The slider's value is read out as this line.
        start: the frame that is shown first, and alone where scripts are off or on paper.
        dpi: pixels an inch of a Matplotlib frame.

    Returns:
        An object that Jupyter, Colab and the built book display.

    Raises:
        ValueError: there are no frames, not one description (or caption) for each, or ``start`` is
            not one of them.
        TypeError: a frame is neither a Matplotlib figure nor bytes.

    >>> import matplotlib.pyplot as plt
    >>> def draw(power):
    ...     figure, axes = plt.subplots(figsize=(2, 1))
    ...     _ = axes.plot(range(5), [x**power for x in range(5)])
    ...     return figure
    >>> stepper((draw(p) for p in (1, 2)), ["A straight line", "A parabola"], label="power")
    Stepper(2 frames, label='power'): A straight line
    """
    pictures = [_picture(frame, dpi) for frame in frames]
    if not pictures:
        raise ValueError("frames: none were given; a stepper needs at least one")
    for name, texts in (("alts", alts), ("captions", captions)):
        if texts is not None and len(texts) != len(pictures):
            raise ValueError(
                f"{name}: {len(texts)} given for {len(pictures)} frames; give one for each frame"
            )
    if not 0 <= start < len(pictures):
        raise ValueError(
            f"start: {start} given; give the number of a frame, 0 to {len(pictures) - 1}"
        )
    return Stepper(pictures, alts, captions or alts, label, start)


def _picture(frame: Figure | bytes, dpi: int) -> bytes:
    """PNG bytes of a frame, small and the same each time it is drawn."""
    if isinstance(frame, bytes):
        return frame
    if not isinstance(frame, Figure):
        raise TypeError(
            f"frames: {type(frame).__name__} given; give Matplotlib figures or PNG bytes"
        )
    buffer = io.BytesIO()
    frame.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    plt.close(frame)
    # 256 colours are enough for a chart and take a third of the bytes.
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
