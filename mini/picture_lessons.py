"""What the miniature's LMM learns from: texts and pictures in any order, and what is to be known of each.

As in `mini.lessons`, a token that names an object should know all that is said of it by then. A
picture's token is such a name, too: of the object that it shows, or else of its background.
"""

from dataclasses import dataclass, field

import torch

from mini import edits, programs, world
from mini.lessons import CAPTIONS, Facts, caption_text, long_text, object_facts, semantic_text
from mini.world import PAIRS
from prompts import apply_task, reference_prompt

PREFIXES = ("", "Generate Image: ", "Copy Image: ", "Edit image ")


@dataclass
class Lesson:
    """A prompt of strings and pictures, and what its tokens should have gathered."""

    prompt: list
    nouns: list | None  # facts (5,) at each noun of the text; None: not asked
    pictures: list = ()  # `Facts` labels (n, 6) of each picture's tokens, in the light of the text
    alone: list = ()  # the same without that light, for the ViT
    marks: dict = field(default_factory=dict)  # further facts: {position from the end: (5,)}


def own_word(tokenizer, word):
    (token,) = tokenizer.encode(f" {word}")
    return torch.tensor([token])


def image_facts(tokenizer, scene):
    """What each of a picture's 3 x 3 tokens stands for, as `Facts` labels (9, 6).

    The token of an object names it, as its noun does in a caption; any other stands for the color of
    the background. So the adapter meets pictures in the terms of words.
    """
    facts = torch.zeros(9, len(Facts.SIZES) + 1, dtype=torch.long)
    facts[:, -1] = own_word(tokenizer, scene.background)
    for o in scene.objects:
        facts[o.place] = crop_facts(tokenizer, o, o.place)[0]
    return facts


def crop_facts(tokenizer, obj, place=None, relation=None):
    """The same of an object's own picture, which is one token: (1, 6)."""
    known = object_facts(obj.shape, obj.color, 1, place, relation)
    return torch.cat([known, own_word(tokenizer, obj.shape)])[None]


def described(scene):
    """The full description of a scene, and the facts at its nouns."""
    nouns = [object_facts(o.shape, o.color, 1, o.place) for o in scene.objects]
    return world.describe(scene), nouns


def text_lesson(tokenizer, rng):
    text = caption_text(rng, two_sided=False) if rng.random() < 0.7 else semantic_text(rng)
    return Lesson([rng.choice(PREFIXES[:2]) + text.text], text.nouns)


def long_text_lesson(tokenizer, rng):
    text = long_text(rng)
    return Lesson([rng.choice(PREFIXES[:2]) + text.text], text.nouns)


def picture_lesson(tokenizer, rng):
    scene = world.sample_scene(rng.choice(CAPTIONS), rng, PAIRS)
    text, nouns = described(scene)
    seen = [image_facts(tokenizer, scene)]
    return Lesson([rng.choice(PREFIXES), world.render(scene), text], nouns, seen, seen)


def question_lesson(tokenizer, rng):
    scene, question = programs.sample_question(rng.choice(programs.QUESTIONS), rng, PAIRS)
    text = f"Q: {question.text} A: {programs.answer(question, scene)}"
    seen = [image_facts(tokenizer, scene)]
    return Lesson([world.render(scene), text], None, seen, seen)


def edit_lesson(tokenizer, rng):
    """The noun of an instruction knows which object is meant, the last word what becomes of it."""
    edit = edits.sample_edit(rng.choice(edits.EDITS), rng, PAIRS)
    prompt, _ = apply_task("edit", [world.render(edit.source), edit.text])
    text, nouns = described(edit.target)
    text = f": {text}" if rng.random() < 0.5 else ""
    nouns, marks = nouns if text else [], {}
    if edit.before:
        o = edit.before
        nouns = [object_facts(o.shape, o.color, 0, o.place), *nouns]
    elif edit.after:
        nouns = [object_facts(edit.after.shape, edit.after.color), *nouns]
    if edit.after:
        o = edit.after
        marks[1 + len(tokenizer.encode(text))] = object_facts(o.shape, o.color, 1, o.place)
    seen = [image_facts(tokenizer, edit.source)]
    return Lesson([*prompt, text], nouns, seen, seen, marks)


def hard_edit_lesson(tokenizer, rng):
    """An instruction by reference, and what the picture is then."""
    edit = edits.sample_edit(rng.choice(edits.HARD_EDITS), rng, PAIRS)
    prompt, _ = apply_task("edit", [world.render(edit.source), edit.text])
    seen = [image_facts(tokenizer, edit.source)]
    return Lesson([*prompt, ": " + world.describe(edit.target)], None, seen, seen)


def reference_lesson(tokenizer, rng):
    """A picture of an object is a noun as well, told by the words before it."""
    made = programs.sample_reference(rng, PAIRS)
    whole, pixels = world.render(made.scene), world.SIZE / 1000
    segments = [
        (text, [whole.crop([round(x * pixels) for x in world.box(o)])] if o else [])
        for text, o in made.segments
    ]
    task, prompt = reference_prompt(segments, rng.random() < 0.5)
    shown = {o: text for text, o in made.segments if o}
    nouns, pictures = [], []
    if task == "combine":
        nouns += [object_facts(o.shape) for o in shown]
        pictures += [crop_facts(tokenizer, o) for o in shown]
    for i, (o, m) in enumerate(zip(made.objects, made.prompt.mentions)):
        relation = made.prompt.relation if i == 1 else None
        if task == "combine" or o not in shown:
            nouns.append(object_facts(o.shape, o.color, 1, m.place, relation))
            continue
        if shown[o]:
            nouns.append(object_facts(o.shape, None, 1, m.place, relation))
        pictures.append(crop_facts(tokenizer, o, m.place, relation))
    alone = [crop_facts(tokenizer, o) for o in shown]
    return Lesson(apply_task(task, prompt)[0], nouns, pictures, alone)


def mixing_lesson(tokenizer, rng):
    """The shape of one picture in the color of another, and what that is.

    The second picture stands for the result, as a noun does; the first is as the word before it.
    """
    a, b = rng.sample(PAIRS, 2)
    if rng.random() < 0.5:
        words, color, shape = ("the color of ", " in the shape of "), a[0], b[1]
    else:
        words, color, shape = ("the shape of ", " in the color of "), b[0], a[1]
    shown = [world.Object(*pair, rng.randrange(9)) for pair in (a, b)]
    pictures = [world.portrait(o, rng.choice(list(world.BACKGROUNDS))) for o in shown]
    prompt, _ = apply_task("objects", [words[0], pictures[0], words[1], pictures[1]])
    result = crop_facts(tokenizer, world.Object(color, shape, 0))
    first = torch.full((1, len(Facts.SIZES) + 1), -1)  # none but its word is asked
    first[:, -1] = own_word(tokenizer, words[0].split()[1])
    alone = [crop_facts(tokenizer, o) for o in shown]
    text = f": a {color} {shape}" if rng.random() < 0.7 else ""
    nouns = [object_facts(shape, color)] if text else []
    return Lesson([*prompt, text], nouns, [first, result], alone)


LESSONS = (  # by length, as pads cost as much as words; a batch is of one of these groups
    {text_lesson: 4},
    {picture_lesson: 3, question_lesson: 2, reference_lesson: 3, mixing_lesson: 1},
    {edit_lesson: 4, hard_edit_lesson: 1, long_text_lesson: 0.5},
)


def sample_lessons(n, tokenizer, rng):
    (group,) = rng.choices(LESSONS, [sum(group.values()) for group in LESSONS])
    return [kind(tokenizer, rng) for kind in rng.choices(list(group), group.values(), k=n)]


@dataclass
class Labels:
    """Of a Batch of lessons: each token's own word, facts and where they are known, the ViT's."""

    words: torch.Tensor  # (B, L)
    facts: torch.Tensor  # (B, L, 5)
    known: torch.Tensor  # (B, L) bool
    alone: torch.Tensor  # (image tokens, 6)

    def to(self, device):
        return Labels(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def labels_of(lessons, batch, nouns):
    """Labels for the Batch that `collate` makes of the lessons' prompts. nouns: ids of noun tokens."""
    words, known = batch.ids.clone(), torch.zeros_like(batch.mask)
    facts = torch.zeros(*words.shape, len(Facts.SIZES), dtype=torch.long)
    for i, lesson in enumerate(lessons):
        marks = {}
        if lesson.nouns is not None:
            rows = [j for j, token in enumerate(batch.ids[i].tolist()) if token in nouns]
            marks = dict(zip(rows, lesson.nouns, strict=True))
        length = int(batch.mask[i].sum())
        marks |= {length - back: label for back, label in lesson.marks.items()}
        for row, label in marks.items():
            facts[i, row], known[i, row] = label, True
        if lesson.pictures:
            cells = torch.cat(lesson.pictures)
            where = batch.image_mask[i]
            facts[i, where], known[i, where] = cells[:, :-1].clamp(0), cells[:, 0] >= 0
            words[i, where] = cells[:, -1]
    none = torch.zeros(0, len(Facts.SIZES) + 1, dtype=torch.long)
    alone = torch.cat([none, *(cells for lesson in lessons for cells in lesson.alone)])
    return Labels(words, facts, known, alone)
