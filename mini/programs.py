"""Texts about scenes beyond captions: prompts with pictures, long and semantic prompts, questions.

Every prompt comes with its meaning, which decides whether the detected scene of a picture is
right. Every question has exactly one answer for a scene. `mini.edits` has instructions.
"""

import random
from collections import Counter
from dataclasses import dataclass

from mini import scenes
from mini.edits import name_of
from mini.scenes import COLORS, SEEN, Mention, Object, Prompt, Scene, as_mention, holding, phrase

NUMBERS = ("zero", "one", "two", "three", "four")
ANSWERS = {  # the answers to each kind of question; `sample_question` draws them equally often
    "total": NUMBERS[1:],
    "count": NUMBERS[:4],
    "color": tuple(COLORS),
    "place": scenes.PLACES,
    "at": ("nothing", *("something",) * 5),
    "exists": ("yes", "no"),
    "relation": ("yes", "no"),
    "background": tuple(scenes.BACKGROUNDS),
}
QUESTIONS = tuple(ANSWERS)
LONG = (  # long prompts: template of a sentence, separator
    ("a {o.color} {o.shape} is at the {place}", ", "),
    ("at the {place} there is a {o.color} {o.shape}", ". "),
    ("the {o.shape} at the {place} is {o.color}", ", "),
)


@dataclass(frozen=True)
class Reference:
    """A scene described by words and by pictures of its objects."""

    scene: Scene
    segments: tuple[tuple[str, Object | None], ...]  # words, then the picture of an object
    objects: tuple[Object, ...]  # in order of mention
    prompt: Prompt  # the whole text, with <image> for each picture, and its meaning


@dataclass(frozen=True)
class Claim:
    """A claim that `what.count` objects fit `what`, or that `what` has a relation to `other`."""

    what: Mention
    relation: str | None = None
    other: Mention | None = None

    def holds(self, scene):
        fitting = [o for o in scene.objects if self.what.fits(o)]
        if self.relation is None:
            return len(fitting) == self.what.count
        others = [o for o in scene.objects if self.other.fits(o)]
        return any(self.relation in holding(a, b) for a in fitting for b in others if a != b)


@dataclass(frozen=True)
class Semantic:
    """A prompt that counts, relates or excludes objects. A right picture has no further objects."""

    text: str
    claims: tuple[Claim, ...]
    told: tuple[Mention, ...]  # the nouns of the text, in order


@dataclass(frozen=True)
class Question:
    kind: str  # one of QUESTIONS
    text: str
    what: Mention | None = None
    relation: str | None = None
    other: Mention | None = None


def satisfies(semantic, scene):
    """Does a detected scene (or None) satisfy all claims of a Semantic?"""
    return scene is not None and all(claim.holds(scene) for claim in semantic.claims)


# ---- prompts ------------------------------------------------------------------------------------


def sample_reference(rng, pairs=SEEN, reserved=False):
    """Draw a Reference of one to three objects, at least one of them as a picture."""
    while (
        scenes.is_reserved((reference := _any_reference(rng, pairs, reserved)).prompt) != reserved
    ):
        pass
    return reference


def _any_reference(rng, pairs, reserved):
    task = rng.choice(("single", "two", "position", "scene"))
    while len((scene := scenes.sample_scene(task, rng, pairs, reserved)).objects) > 3:
        pass
    caption = scenes.caption(scene, task, rng)
    objects, segments, rest = [], [], caption.text
    n = len(caption.mentions)
    pictured = rng.sample(range(n), rng.randint(1, n))
    for i, mention in enumerate(caption.mentions):
        (obj,) = filter(mention.fits, scene.objects)
        objects.append(obj)
        article = "" if task == "scene" else "a "
        words = f"{mention.color} {mention.shape}" if task == "scene" else phrase(mention)
        before, _, rest = rest.partition(words)
        name = article + obj.shape
        if caption.text != words:  # the prompt has other words, so the name may be left out
            name = rng.choice(("", name))
        noun = (name, obj) if i in pictured else (article + " ".join(obj.pair), None)
        segments += [(before, None), noun]
    segments = tuple(s for s in (*segments, (rest, None)) if s != ("", None))
    text = "".join(words + "<image>" if obj else words for words, obj in segments)
    mentions = tuple(as_mention(o, place=task == "scene") for o in objects)
    prompt = Prompt(text, mentions, caption.relation, caption.background)
    return Reference(scene, segments, tuple(objects), prompt)


def reference_record(reference):
    """A Reference as a dataset example of task objects."""
    segments = [(text, [scenes.box(obj)] if obj else []) for text, obj in reference.segments]
    return {"task": "objects", "segments": segments, "target": scenes.render(reference.scene)}


def sample_long(rng, pairs=SEEN, reserved=False):
    """Draw a Scene of four objects and a Prompt of sentences that describe all of it."""
    while True:
        scene = scenes.sample_scene("scene", rng, pairs, reserved)
        if len(scene.objects) < 4:
            continue
        objects = rng.sample(scene.objects, 4)
        form, mark = rng.choice(LONG)
        parts = [form.format(o=o, place=scenes.PLACES[o.place]) for o in objects]
        text = mark.join([*parts, f"the background is {scene.background}"])
        mentions = tuple(as_mention(o, place=True) for o in objects)
        prompt = Prompt(text, mentions, None, scene.background)
        if scenes.is_reserved(prompt) == reserved:
            return scene, prompt


def sample_semantic(rng, pairs=SEEN, reserved=False):
    """Draw a Scene and a Semantic that is true of it."""
    while True:
        scene = scenes.sample_scene("scene", rng, pairs, reserved)
        prompt = rng.choice((counted, denied, shared, related))(scene, rng)
        if prompt and scenes.is_reserved(prompt) == reserved and not is_plain(prompt):
            return scene, prompt


def is_plain(prompt):
    """Could `scenes.caption` write the same text? (As a caption, it may be reserved.)"""
    single = all(mention.count == 1 for mention in prompt.told)
    only_counts = len(prompt.claims) == 1 + len(prompt.told)
    return only_counts and "objects" not in prompt.text and len(prompt.told) <= 1 + single


def semantic(scene, text, mentions, *claims):
    """The Semantic that claims the total of objects, every mention and further claims."""
    total = Claim(Mention(None, count=len(scene.objects)))
    return Semantic(text, (total, *map(Claim, mentions), *claims), mentions)


def counted(scene, rng):
    """'two circles, a star and a ring'"""
    counts = Counter(o.shape for o in rng.sample(scene.objects, len(scene.objects)))
    mentions = tuple(Mention(shape, None, n) for shape, n in counts.items())
    *first, last = map(phrase, mentions)
    text = f"{', '.join(first)} and {last}" if first else last
    return semantic(scene, text, mentions)


def denied(scene, rng):
    """'two circles and a star, nothing red' or 'a star that is not red'"""
    color = rng.choice([c for c in COLORS if c not in {o.color for o in scene.objects}])
    base = counted(scene, rng)
    ending = f", nothing {color}"
    if len(scene.objects) == 1:
        ending = rng.choice((ending, f" that is not {color}"))
    return semantic(scene, base.text + ending, base.told, Claim(Mention(None, color, 0)))


def shared(scene, rng):
    """'four objects, two of them circles' or 'three objects, none of them red'; or None."""
    n = len(scene.objects)
    if n < 2:
        return None
    by_shape = rng.random() < 0.5
    word = rng.choice(scenes.SHAPES if by_shape else list(COLORS))
    count = sum(word in o.pair for o in scene.objects)
    if count == 0 and rng.random() < 0.7:
        return None
    noun = word if not by_shape else f"a {word}" if count < 2 else scenes.plural(word)
    text = f"{NUMBERS[n]} objects, {NUMBERS[count] if count else 'none'} of them {noun}"
    if by_shape:
        return semantic(scene, text, (Mention(word, None, count),))
    return semantic(scene, text, (), Claim(Mention(None, word, count)))


def related(scene, rng):
    """'a red circle left of a blue star and above a green ring'; None without three shapes."""
    objects = rng.sample(scene.objects, len(scene.objects))
    if len(objects) != 3 or len({o.shape for o in objects}) < 3:
        return None
    mentions = tuple(as_mention(o, color=rng.random() < 0.7) for o in objects)
    relations = [rng.choice(holding(objects[0], other)) for other in objects[1:]]
    words = [rng.choice(scenes.RELATIONS[relation]) for relation in relations]
    first, second, third = map(phrase, mentions)
    text = f"{first} {words[0]} {second} and {words[1]} {third}"
    claims = [Claim(mentions[0], *pair) for pair in zip(relations, mentions[1:])]
    return semantic(scene, text, mentions, *claims)


# ---- questions ----------------------------------------------------------------------------------


def answer(question, scene):
    """The answer to a Question about a scene."""
    kind, what = question.kind, question.what
    if kind == "background":
        return scene.background
    if kind == "relation":
        return "yes" if Claim(what, question.relation, question.other).holds(scene) else "no"
    fitting = [o for o in scene.objects if what.fits(o)]
    if kind in ("total", "count"):
        return NUMBERS[len(fitting)]
    if kind == "exists":
        return "yes" if fitting else "no"
    if kind == "at":
        return f"a {' '.join(fitting[0].pair)}" if fitting else "nothing"
    (obj,) = fitting  # `sample_question` asks for a color or place only if one object fits
    return obj.color if kind == "color" else scenes.PLACES[obj.place]


def sample_question(kind, rng, pairs=SEEN, reserved=False):
    """Draw a Scene and a Question about it, with an answer drawn evenly from ANSWERS[kind]."""
    wanted = rng.choice(ANSWERS[kind])
    while True:
        scene = scenes.sample_scene(rng.choice(("scene", "counting", "two")), rng, pairs, reserved)
        for _ in range(20):
            if question := _any_question(kind, scene, rng):
                found = answer(question, scene)
                if found == wanted or (wanted == "something" and found != "nothing"):
                    return scene, question


def _any_question(kind, scene, rng):
    """A Question about random objects or words, or None if its answer would not be clear."""
    place, obj = rng.randrange(9), rng.choice(scene.objects)
    shape, color = rng.choice(scenes.SHAPES), rng.choice(list(COLORS))
    if kind == "background":
        return Question(kind, "what color is the background?")
    if kind == "total":
        return Question(kind, "how many objects are there?", Mention(None))
    if kind == "at":
        return Question(kind, f"what is at the {scenes.PLACES[place]}?", Mention(None, place=place))
    if kind in ("count", "exists"):
        color, shape = rng.choice(((obj.color, shape), (color, obj.shape), obj.pair))
        what = rng.choice((Mention(shape), Mention(shape, color), Mention(None, color)))
        noun = what.shape or "object"
        if kind == "exists":
            return Question(kind, f"is there {phrase(Mention(noun, what.color))}?", what)
        words = " ".join(filter(None, (what.color, scenes.plural(noun))))
        return Question(kind, f"how many {words} are there?", what)
    if not (name := name_of(obj, scene, rng)):
        return None
    what = as_mention(obj, color=obj.color in name)
    if kind == "place":
        return Question(kind, f"where is the {name}?", what)
    if kind == "color":
        alone = sum(o.shape == obj.shape for o in scene.objects) == 1
        text = f"what color is the {obj.shape}?"
        return Question(kind, text, Mention(obj.shape)) if alone else None
    other = rng.choice(scene.objects)
    second = name_of(other, scene, rng)
    if other == obj or not second:
        return None
    relation = rng.choice(list(scenes.RELATIONS))
    text = f"is the {name} {rng.choice(scenes.RELATIONS[relation])} the {second}?"
    return Question(kind, text, what, relation, as_mention(other, color=other.color in second))


def majority(kind, n=2000):
    """The accuracy of always giving the most frequent answer, over n questions of a kind."""
    rng = random.Random(f"majority {kind}")
    answers = Counter(answer(q, s) for s, q in (sample_question(kind, rng) for _ in range(n)))
    return answers.most_common(1)[0][1] / n
