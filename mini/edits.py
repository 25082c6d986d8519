"""Edits: instructions to change a scene, each with the one scene that is the right result.

The target is a Scene, so `scenes.detect` decides whether an edited picture is right. Each kind has
a function that draws a random Edit of a source, or returns None if the source allows none.
"""

from dataclasses import dataclass

from mini import scenes
from mini.scenes import SEEN, Mention, Object, Scene, as_mention

EDITS = ("recolor", "remove", "add", "move", "background")  # one change
HARD_EDITS = (
    "reference",
    "swap",
    "several",
)  # object named by a relation; two objects; three edits
RECOLOR = (("make", ""), ("turn", ""), ("change", "to "), ("recolor", "to "))


@dataclass(frozen=True)
class Edit:
    """A source scene, an instruction and the target scene."""

    kind: str  # one of EDITS or HARD_EDITS
    source: Scene
    text: str
    target: Scene
    before: Object | None = None  # the changed object in the source
    after: Object | None = None  # the changed object in the target
    mentions: tuple[Mention, ...] = ()  # nouns of the text, as in the target; count 0: removed


def sample_edit(kind, rng, pairs=SEEN, reserved=False):
    """Draw a random Edit of a kind; arguments as of `scenes.sample_scene`.

    With HELD_OUT, the source has pairs of SEEN, and the object of a recolor or add a held-out one.
    """
    source_pairs = SEEN if pairs is scenes.HELD_OUT else pairs
    while True:
        source = scenes.sample_scene("scene", rng, source_pairs, reserved)
        edit = MAKERS[kind](source, rng, pairs)
        if edit and scenes.is_reserved(edit.target) == reserved and edit.target.objects:
            return edit


def name_of(obj, scene, rng):
    """'circle' or 'red circle', if that names only this object in the scene; else None."""
    if sum(o.pair == obj.pair for o in scene.objects) > 1:
        return None
    alone = sum(o.shape == obj.shape for o in scene.objects) == 1
    return obj.shape if alone and rng.random() < 0.5 else f"{obj.color} {obj.shape}"


def replaced(scene, before, after):
    """The scene without the objects `before` and with the objects `after`."""
    objects = [o for o in scene.objects if o not in before] + list(after)
    return Scene(scene.background, tuple(sorted(objects, key=lambda o: o.place)))


def of_one(kind, source, text, before, after, *mentions):
    """The Edit that replaces an object by another. No before: it adds. No after: it removes."""
    target = replaced(source, [before], filter(None, [after]))
    return Edit(kind, source, text, target, before, after, mentions)


def free_place(scene, rng):
    return rng.choice([p for p in range(9) if p not in {o.place for o in scene.objects}])


def other_color(obj, rng, pairs):
    """The object in another color, or None if pairs has no other color of its shape."""
    colors = [c for c, s in pairs if s == obj.shape and c != obj.color]
    return Object(rng.choice(colors), obj.shape, obj.place) if colors else None


def background(source, rng, pairs):
    (color,) = scenes.BACKGROUNDS.keys() - {source.background}
    verb = rng.choice(("make the background", "turn the background", "change the background to"))
    return Edit("background", source, f"{verb} {color}", Scene(color, source.objects))


def add(source, rng, pairs):
    after = Object(*rng.choice(pairs), free_place(source, rng))
    text = f"add a {after.color} {after.shape} to the {scenes.PLACES[after.place]}"
    if len(source.objects) < 4:
        return of_one("add", source, text, None, after, as_mention(after, place=True))


def remove(source, rng, pairs):
    before = rng.choice(source.objects)
    if name := name_of(before, source, rng):
        mention = as_mention(before, 0, before.color in name)
        return of_one("remove", source, f"remove the {name}", before, None, mention)


def move(source, rng, pairs):
    before = rng.choice(source.objects)
    after = Object(*before.pair, free_place(source, rng))
    if name := name_of(before, source, rng):
        mention = as_mention(after, 1, before.color in name, place=True)
        text = f"move the {name} to the {scenes.PLACES[after.place]}"
        return of_one("move", source, text, before, after, mention)


def recolor(source, rng, pairs):
    before = rng.choice(source.objects)
    after, name = other_color(before, rng, pairs), name_of(before, source, rng)
    if after and name:
        verb, to = rng.choice(RECOLOR)
        text = f"{verb} the {name} {to}{after.color}"
        return of_one("recolor", source, text, before, after, as_mention(after))


def reference(source, rng, pairs):
    """Remove or recolor 'the object left of the circle'."""
    anchor, relation = rng.choice(source.objects), rng.choice(list(scenes.RELATIONS))
    related = [o for o in source.objects if o != anchor and relation in scenes.holding(o, anchor)]
    name = name_of(anchor, source, rng)
    if len(related) != 1 or not name:
        return None
    (before,), after = related, None
    what = f"the object {rng.choice(scenes.RELATIONS[relation])} the {name}"
    text = f"remove {what}"
    if rng.random() < 0.5:
        if not (after := other_color(before, rng, pairs)):
            return None
        verb, to = rng.choice(RECOLOR)
        text = f"{verb} {what} {to}{after.color}"
    mention = as_mention(anchor, 1, anchor.color in name)
    return of_one("reference", source, text, before, after, mention)


def swap(source, rng, pairs):
    """Swap the colors or the places of two objects."""
    if len(source.objects) < 2:
        return None
    a, b = rng.sample(source.objects, 2)
    names = name_of(a, source, rng), name_of(b, source, rng)
    if rng.random() < 0.5:
        what, new = "colors", (Object(b.color, a.shape, a.place), Object(a.color, b.shape, b.place))
    else:
        what, new = "places", (Object(*a.pair, b.place), Object(*b.pair, a.place))
    if not all(names) or a.color == b.color or any(o.pair not in pairs for o in new):
        return None
    text = f"swap the {what} of the {names[0]} and the {names[1]}"
    target = replaced(source, (a, b), new)
    return Edit("swap", source, text, target, mentions=tuple(map(as_mention, new)))


def several(source, rng, pairs):
    """Three edits of different kinds in one instruction; no edit changes the result of another."""
    done, scene = [], source
    for kind in rng.sample(EDITS, 3):
        edit = MAKERS[kind](scene, rng, pairs)
        if not edit or not edit.target.objects:
            return None
        if edit.before and edit.before in [earlier.after for earlier in done]:
            return None
        done.append(edit)
        scene = edit.target
    if any(edit.after and edit.after not in scene.objects for edit in done):
        return None
    text = "{}, {} and {}".format(*(edit.text for edit in done))
    mentions = tuple(mention for edit in done for mention in edit.mentions)
    return Edit("several", source, text, scene, mentions=mentions)


MAKERS = {m.__name__: m for m in (recolor, remove, add, move, background, reference, swap, several)}
