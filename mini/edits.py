"""Instructions: what a user may ask to be changed in a scene, and the one scene that it makes."""

from dataclasses import dataclass

from mini import scenes
from mini.scenes import SEEN, Mention, Object, Scene, as_mention

EDITS = ("recolor", "remove", "add", "move", "background")  # of one object that is named
HARD_EDITS = ("reference", "swap", "several")  # told by another object; two at once; three in one
RECOLOR = (("make", ""), ("turn", ""), ("change", "to "), ("recolor", "to "))


@dataclass(frozen=True)
class Edit:
    """An instruction, and the one scene that it makes of another."""

    kind: str  # one of EDITS or HARD_EDITS
    source: Scene
    text: str
    target: Scene
    before: Object | None = None  # the object meant, as it is in the source
    after: Object | None = None  # and in the target
    told: tuple[Mention, ...] = ()  # each noun of the text: as it will be, count 0 if it goes


def sample_edit(kind, rng, pairs=SEEN, exam=False):
    """A random Edit of a kind; what it names is there once.

    All objects are of pairs; if those are HELD_OUT, only what a recolor or add makes is, of a source
    of SEEN ones.
    """
    given = SEEN if pairs is scenes.HELD_OUT else pairs
    while True:
        source = scenes.sample_scene("scene", rng, given, exam)
        edit = MAKERS[kind](source, rng, pairs)
        if edit and scenes.is_exam(edit.target) == exam and edit.target.objects:
            return edit


def name_of(obj, scene, rng):
    """'circle' or 'red circle', so that no other object of the scene is meant, or None."""
    if sum(o.pair == obj.pair for o in scene.objects) > 1:
        return None
    alone = sum(o.shape == obj.shape for o in scene.objects) == 1
    return obj.shape if alone and rng.random() < 0.5 else f"{obj.color} {obj.shape}"


def replaced(scene, before, after):
    """The scene with some of its objects replaced by others."""
    objects = [o for o in scene.objects if o not in before] + list(after)
    return Scene(scene.background, tuple(sorted(objects, key=lambda o: o.place)))


def of_one(kind, source, text, before, after, *told):
    """The Edit that puts one object (or None) in the place of another (or None)."""
    target = replaced(source, [before], filter(None, [after]))
    return Edit(kind, source, text, target, before, after, told)


def free_place(scene, rng):
    return rng.choice([p for p in range(9) if p not in {o.place for o in scene.objects}])


def other_color(obj, rng, pairs):
    colors = [c for c, s in pairs if s == obj.shape and c != obj.color]
    return Object(rng.choice(colors), obj.shape, obj.place) if colors else None


def background(source, rng, pairs):
    (paper,) = scenes.BACKGROUNDS.keys() - {source.background}
    verb = rng.choice(("make the background", "turn the background", "change the background to"))
    return Edit("background", source, f"{verb} {paper}", Scene(paper, source.objects))


def add(source, rng, pairs):
    after = Object(*rng.choice(pairs), free_place(source, rng))
    text = f"add a {after.color} {after.shape} to the {scenes.PLACES[after.place]}"
    if len(source.objects) < 4:
        return of_one("add", source, text, None, after, as_mention(after, place=True))


def remove(source, rng, pairs):
    before = rng.choice(source.objects)
    if name := name_of(before, source, rng):
        told = as_mention(before, 0, before.color in name)
        return of_one("remove", source, f"remove the {name}", before, None, told)


def move(source, rng, pairs):
    before = rng.choice(source.objects)
    after = Object(*before.pair, free_place(source, rng))
    if name := name_of(before, source, rng):
        told = as_mention(after, 1, before.color in name, place=True)
        text = f"move the {name} to the {scenes.PLACES[after.place]}"
        return of_one("move", source, text, before, after, told)


def recolor(source, rng, pairs):
    before = rng.choice(source.objects)
    after, name = other_color(before, rng, pairs), name_of(before, source, rng)
    if after and name:
        verb, to = rng.choice(RECOLOR)
        text = f"{verb} the {name} {to}{after.color}"
        return of_one("recolor", source, text, before, after, as_mention(after))


def reference(source, rng, pairs):
    """Remove or recolor the only object that stands in a relation to another."""
    anchor, relation = rng.choice(source.objects), rng.choice(list(scenes.RELATIONS))
    meant = [o for o in source.objects if o != anchor and relation in scenes.holding(o, anchor)]
    name = name_of(anchor, source, rng)
    if len(meant) != 1 or not name:
        return None
    (before,), after = meant, None
    what = f"the object {rng.choice(scenes.RELATIONS[relation])} the {name}"
    text = f"remove {what}"
    if rng.random() < 0.5:
        if not (after := other_color(before, rng, pairs)):
            return None
        verb, to = rng.choice(RECOLOR)
        text = f"{verb} {what} {to}{after.color}"
    told = as_mention(anchor, 1, anchor.color in name)
    return of_one("reference", source, text, before, after, told)


def swap(source, rng, pairs):
    """Two objects change colors, or places."""
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
    return Edit("swap", source, text, target, told=tuple(map(as_mention, new)))


def several(source, rng, pairs):
    """Three instructions of different kinds, one after the other; none touches what another made."""
    made, scene = [], source
    for kind in rng.sample(EDITS, 3):
        edit = MAKERS[kind](scene, rng, pairs)
        if not edit or not edit.target.objects:
            return None
        if edit.before and edit.before in [earlier.after for earlier in made]:
            return None
        made.append(edit)
        scene = edit.target
    if any(edit.after and edit.after not in scene.objects for edit in made):
        return None
    text = "{}, {} and {}".format(*(edit.text for edit in made))
    told = tuple(mention for edit in made for mention in edit.told)
    return Edit("several", source, text, scene, told=told)


MAKERS = {m.__name__: m for m in (recolor, remove, add, move, background, reference, swap, several)}
