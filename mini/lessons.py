"""What the miniature's text encoders learn from: all that can be said and shown, and its facts.

Encoders as small as these do not by themselves gather at a noun all that is said of it, which would
tell the MM-DiT the whole story in one token. So throw-away linear readouts (`Facts`) ask it of them
while they learn. A picture's token is such a noun, too: of its object, or else of its background.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

from mini import edits, programs, scenes
from mini.scenes import COLORS, PAIRS, RELATIONS, SHAPES, Mention, Object, as_mention
from prompts import apply_task, reference_prompt

CAPTIONS = (*scenes.TASKS, "scene")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SENTENCES = ("Segment the image.", "Draw the edges.", "Describe the image.", "")
PREFIXES = ("", "Generate Image: ", "Copy Image: ", "Edit image ")
FACTS = {"shape": 7, "color": 7, "count": 5, "place": 10, "relation": 5}  # and how many there are


class Facts(nn.Module):
    """Linear readouts of what a state knows of its token's object, as `facts_of`, and of its word."""

    def __init__(self, width, vocabulary):
        super().__init__()
        sizes = (*FACTS.values(), vocabulary)
        self.readouts = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, states, labels):
        """states (n, width), labels (n, 5 or 6) -> the mean cross-entropy, summed over the facts."""
        pairs = zip(self.readouts, labels.unbind(1))
        return sum(F.cross_entropy(readout(states), label) for readout, label in pairs)

    def words(self, states):
        """Logits of each state's own word."""
        return self.readouts[-1](states)


def facts_of(mention, relation=None):
    """What is said of one object, as five labels; 0: not said, or none; count 0: it goes, or is denied."""
    shape, color = (None, *SHAPES).index(mention.shape), (None, *COLORS).index(mention.color)
    place, relation = (None, *range(9)).index(mention.place), (None, *RELATIONS).index(relation)
    return shape, color, mention.count, place, relation


@dataclass
class Lesson:
    """A prompt of strings and pictures, and the facts that its tokens should have gathered.

    A token of a picture is (word, facts): an object's word is its shape, as its noun is in a caption;
    any other token stands for the color of the background. Without facts, none but the word is asked.
    """

    prompt: list
    nouns: list | None  # facts at each noun of the text; None: not asked
    pictures: list = ()  # tokens of all pictures, in the light of the text before them
    alone: list | None = None  # the same without that light, for the ViT, if it differs
    outcome: tuple | None = None  # facts at the last word before the last part of the prompt


def caption_text(rng, two_sided=True):
    """A caption. An encoder that looks both ways also knows the relation at the first noun."""
    _, prompt = scenes.sample_caption(rng.choice(CAPTIONS), rng, PAIRS)
    relation = prompt.relation
    relations = (relation, OPPOSITE.get(relation)) if two_sided else (None, relation)
    pairs = zip(prompt.mentions, (*relations, None, None))
    return Lesson([prompt.text], [facts_of(*pair) for pair in pairs])


def sample_answer(rng):
    """A scene, and a question to it with its answer."""
    scene, question = programs.sample_question(rng.choice(programs.QUESTIONS), rng, PAIRS)
    return scene, f"Q: {question.text} A: {programs.answer(question, scene)}"


def text_of(kind, rng):
    """A Lesson of one text, of a kind of TEXTS."""
    if kind == "caption":
        return caption_text(rng)
    if kind == "question":
        return Lesson([sample_answer(rng)[1]], None)
    if kind == "sentence":
        return Lesson([rng.choice(SENTENCES)], [])
    if kind == "edit":
        edit = edits.sample_edit(rng.choice((*edits.EDITS, *edits.HARD_EDITS)), rng, PAIRS)
        return Lesson([edit.text], list(map(facts_of, edit.told)))
    long = kind == "long"
    _, prompt = (programs.sample_long if long else programs.sample_semantic)(rng, PAIRS)
    return Lesson([prompt.text], list(map(facts_of, prompt.mentions if long else prompt.told)))


TEXTS = {"caption": 8, "long": 2, "semantic": 3, "edit": 5, "question": 3, "sentence": 1}


def sample_texts(n, rng):
    """n Lessons of one text each, for the T5."""
    return [text_of(kind, rng) for kind in rng.choices(list(TEXTS), TEXTS.values(), k=n)]


# ---- texts and pictures -------------------------------------------------------------------------


def tokens_of(scene):
    """The 3 x 3 tokens of a scene's picture."""
    tokens = [(scene.background, (0,) * len(FACTS))] * 9
    for o in scene.objects:
        tokens[o.place] = o.shape, facts_of(as_mention(o, place=True))
    return tokens


def portrait_tokens(objects):
    """The token of each object's own picture."""
    return [(o.shape, facts_of(as_mention(o))) for o in objects]


def described(scene):
    """The full description of a scene, and the facts at its nouns."""
    return scenes.describe(scene), [facts_of(as_mention(o, place=True)) for o in scene.objects]


def text_lesson(rng):
    lesson = caption_text(rng, two_sided=False) if rng.random() < 0.7 else text_of("semantic", rng)
    return Lesson([rng.choice(PREFIXES[:2]) + lesson.prompt[0]], lesson.nouns)


def long_text_lesson(rng):
    lesson = text_of("long", rng)
    return Lesson([rng.choice(PREFIXES[:2]) + lesson.prompt[0]], lesson.nouns)


def picture_lesson(rng):
    scene = scenes.sample_scene(rng.choice(CAPTIONS), rng, PAIRS)
    text, nouns = described(scene)
    prompt = [rng.choice(PREFIXES), scenes.render(scene), text]
    return Lesson(prompt, nouns, tokens_of(scene))


def question_lesson(rng):
    scene, text = sample_answer(rng)
    return Lesson([scenes.render(scene), text], None, tokens_of(scene))


def edit_lesson(rng):
    """The noun of an instruction knows which object is meant, the last word what becomes of it."""
    edit = edits.sample_edit(rng.choice(edits.EDITS), rng, PAIRS)
    prompt, _ = apply_task("edit", [scenes.render(edit.source), edit.text])
    text, nouns = described(edit.target)
    text, nouns = (f": {text}", nouns) if rng.random() < 0.5 else ("", [])
    if edit.before:
        nouns = [facts_of(as_mention(edit.before, 0, place=True)), *nouns]
    elif edit.after:
        nouns = [facts_of(as_mention(edit.after)), *nouns]
    outcome = facts_of(as_mention(edit.after, place=True)) if edit.after else None
    return Lesson([*prompt, text], nouns, tokens_of(edit.source), outcome=outcome)


def hard_edit_lesson(rng):
    """A hard instruction, and what the picture is then."""
    edit = edits.sample_edit(rng.choice(edits.HARD_EDITS), rng, PAIRS)
    prompt, _ = apply_task("edit", [scenes.render(edit.source), edit.text])
    prompt.append(f": {scenes.describe(edit.target)}")
    return Lesson(prompt, None, tokens_of(edit.source))


def reference_lesson(rng):
    """A picture of an object is a noun as well, told by the words before it."""
    made = programs.sample_reference(rng, PAIRS)
    paper, segments = made.scene.background, made.segments
    segments = [(text, [scenes.portrait(o, paper)] if o else []) for text, o in segments]
    task, prompt = reference_prompt(segments, rng.random() < 0.5)
    names = {o: text for text, o in made.segments if o}
    alone = portrait_tokens(names)
    nouns, pictures = [], []
    if task == "combine":  # each picture after its name, and then the text
        nouns, pictures = [facts_of(as_mention(o, color=False)) for o in names], list(alone)
    for i, (o, mention) in enumerate(zip(made.objects, made.prompt.mentions)):
        relation = made.prompt.relation if i == 1 else None
        if task == "combine" or o not in names:
            nouns.append(facts_of(mention, relation))
            continue
        if names[o]:
            nouns.append(facts_of(replace(mention, color=None), relation))
        pictures.append((o.shape, facts_of(mention, relation)))
    return Lesson(apply_task(task, prompt)[0], nouns, pictures, alone)


def mixing_lesson(rng):
    """The shape of one picture in the color of another; the second is as a noun that is the result."""
    a, b = rng.sample(PAIRS, 2)
    if rng.random() < 0.5:
        first, second, result = "color", "shape", Mention(b[1], a[0])
    else:
        first, second, result = "shape", "color", Mention(a[1], b[0])
    shown = [Object(*pair, rng.randrange(9)) for pair in (a, b)]
    pictures = [scenes.portrait(o, rng.choice(list(scenes.BACKGROUNDS))) for o in shown]
    prompt = [f"the {first} of ", pictures[0], f" in the {second} of ", pictures[1]]
    text = f": {scenes.phrase(result)}" if rng.random() < 0.7 else ""
    tokens = [(first, None), (result.shape, facts_of(result))]
    prompt = [*apply_task("objects", prompt)[0], text]
    return Lesson(prompt, [facts_of(result)] * bool(text), tokens, portrait_tokens(shown))


LESSONS = (  # by length, as pads cost as much as words; a batch is of one of these groups
    {text_lesson: 4},
    {picture_lesson: 3, question_lesson: 2, reference_lesson: 3, mixing_lesson: 1},
    {edit_lesson: 4, hard_edit_lesson: 1, long_text_lesson: 0.5},
)


def sample_lessons(n, rng):
    """n Lessons for the LMM, of one group."""
    (group,) = rng.choices(LESSONS, [sum(group.values()) for group in LESSONS])
    return [kind(rng) for kind in rng.choices(list(group), group.values(), k=n)]
