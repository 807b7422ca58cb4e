"""Films with sound, made on the spot."""

import numpy as np

from minicpm_tune.data.media.audio import RATE


def write_film(path, *, frames=47, fps=10, seconds=4.2, size=(64, 48)):
    """A film whose frame n has brightness 5 * n, with a tone; its sound may be shorter or longer than its pictures."""
    import av

    with av.open(str(path), "w") as film:
        pictures = film.add_stream("mpeg4", rate=fps)
        pictures.width, pictures.height, pictures.pix_fmt = *size, "yuv420p"
        sound = film.add_stream("pcm_s16le", rate=RATE, layout="mono") if seconds else None
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 5 * number % 256, dtype=np.uint8)
            film.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(pictures.encode(None))
        if sound is not None:
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
            samples = (tone * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.rate = RATE
            film.mux([*sound.encode(frame), *sound.encode(None)])
    return path
