"""The training set of the miniature's VAE: random pictures, about half of them rendered scenes.

A VAE trained on the six colors of scenes alone would memorise them. The other half therefore shows
shapes in any colors, outlines, stripes, gradients, blobs, and noise like that of photographs.
"""

import numpy as np
from PIL import ImageDraw

from mini import scenes
from mini.scenes import PAIRS, SIZE


def sample(rng):
    """Draw a random 48x48 picture. It never shows a scene that is reserved for the test set."""
    kinds = (drawn_scene, any_colors, outlines, stripes, gradient, blobs, noise)
    (kind,) = rng.choices(kinds, (52, 34, 5, 2, 2, 4, 1))
    return scenes.picture(np.asarray(kind(rng)))


def drawn_scene(rng):
    scene = scenes.sample_scene("scene", rng, PAIRS)
    labels = scenes.segment(scene)
    return scenes.render(
        labels if rng.random() < 0.15 and not scenes.is_reserved(labels) else scene
    )


def any_colors(rng):
    """A scene in nearly its own colors, or up to nine shapes of any color on any background."""
    if rng.random() < 0.5:  # teaches the VAE to distinguish similar colors
        scene = scenes.sample_scene("scene", rng, PAIRS)
        shapes = [(o.place, o.shape, near(scenes.COLORS[o.color], rng)) for o in scene.objects]
        return scenes.paint(near(scenes.BACKGROUNDS[scene.background], rng), shapes)
    places = rng.sample(range(9), rng.randint(1, 9))
    shapes = [(place, rng.choice(scenes.SHAPES), color(rng)) for place in places]
    return scenes.paint(color(rng) if rng.random() < 0.7 else gradient(rng), shapes)


def outlines(rng):
    return scenes.edges(scenes.sample_scene("scene", rng, PAIRS))


def stripes(rng):
    """Waves between two colors, of any direction and width."""
    wave = np.sin(slope(rng) * rng.uniform(2, 25) + rng.uniform(0, 7))
    return mixed((wave * rng.uniform(1, 6)).clip(-1, 1) / 2 + 0.5, rng)


def gradient(rng):
    return mixed((slope(rng) / 2.8 + 0.5).clip(0, 1), rng)


def blobs(rng):
    """Overlapping ellipses and polygons of many sizes, with noise, like objects in a photograph."""
    image = scenes.picture(gradient(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 30)):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(0, SIZE), 2 + 18 * rng.random() ** 3
        if rng.random() < 0.5:
            height = r * rng.uniform(0.4, 1)
            draw.ellipse((x - r, y - height, x + r, y + height), fill=color(rng))
        else:
            corners = [(x + rng.uniform(-r, r), y + rng.uniform(-r, r)) for _ in range(4)]
            draw.polygon(corners, fill=color(rng))
    grain = np.asarray(scenes.picture(noise(rng)), dtype=np.float32)
    return np.asarray(image, dtype=np.float32) + grain * 0.3 - 38


def noise(rng):
    """Noise whose power falls with frequency, as it does in photographs."""
    random = np.random.default_rng(rng.getrandbits(64))
    fy, fx = np.fft.fftfreq(SIZE)[:, None, None], np.fft.rfftfreq(SIZE)[None, :, None]
    amplitude = (np.hypot(fy, fx) + 0.5 / SIZE) ** -rng.uniform(1, 2)
    spectrum = random.standard_normal((2, SIZE, SIZE // 2 + 1, 3))
    waves = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) * amplitude, (SIZE, SIZE), axes=(0, 1))
    gray = waves.mean(2, keepdims=True)
    waves = gray + (waves - gray) * rng.uniform(0, 1)  # photographs have correlated color channels
    waves = (waves - waves.mean()) / waves.std()
    return np.array(color(rng)) + waves * rng.uniform(15, 60)


def color(rng):
    return tuple(rng.randint(0, 255) for _ in range(3))


def near(rgb, rng, distance=50):
    return tuple(min(255, max(0, x + rng.randint(-distance, distance))) for x in rgb)


def slope(rng):
    """A linear ramp (48, 48, 1) in a random direction, within about -1.4 to 1.4."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, SIZE, dtype=np.float32)
    return np.cos(angle) * line[None, :, None] + np.sin(angle) * line[:, None, None]


def mixed(share, rng):
    """Mix two random colors: share (48, 48, 1) in [0, 1] -> pixels (48, 48, 3)."""
    return share * np.array(color(rng)) + (1 - share) * np.array(color(rng))
