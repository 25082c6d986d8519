"""The training set of the miniature's text encoders: prompts with labels for their tokens.

The state of a noun helps the MM-DiT most if it holds all that the prompt says about the object.
Encoders as small as these do not learn this by predicting words alone. During training, linear
probes therefore predict five facts from the state of each noun: shape, color, count, place and
relation. The token of a picture is labelled like a noun. The probes are discarded after training.
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
FACTS = {"shape": 7, "color": 7, "count": 5, "place": 10, "relation": 5}  # fact: number of classes


class Probes(nn.Module):
    """Linear probes that predict the facts and the word of a token from its state."""

    def __init__(self, width, vocabulary):
        super().__init__()
        sizes = (*FACTS.values(), vocabulary)
        self.readouts = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, states, labels):
        """States (n, width), labels (n, 5 or 6: with the word) -> the summed cross-entropies."""
        pairs = zip(self.readouts, labels.unbind(1))
        return sum(F.cross_entropy(readout(states), label) for readout, label in pairs)

    def words(self, states):
        """The logits (..., vocabulary) of the word of each state (..., width)."""
        return self.readouts[-1](states)


def facts_of(mention, relation=None):
    """The five labels of a mention. 0 means not said; count 0 means removed or excluded."""
    shape, color = (None, *SHAPES).index(mention.shape), (None, *COLORS).index(mention.color)
    place, relation = (None, *range(9)).index(mention.place), (None, *RELATIONS).index(relation)
    return shape, color, mention.count, place, relation


@dataclass
class LabelledPrompt:
    """A prompt of strings and pictures, with labels for its tokens.

    The label of an image token is (word, facts). The word is the shape of its object, or else the
    color of the background. Where the facts are None, none are predicted.
    """

    prompt: list
    nouns: list | None  # facts of each noun of the text; None: not trained
    image_tokens: list = ()  # labels for the LMM, whose states depend on the text before a picture
    vit_tokens: list | None = None  # labels for the ViT, which reads no text; None: the same
    outcome: tuple | None = None  # facts at the last token before the last part of the prompt


def caption_text(rng, bidirectional=True):
    """A caption. In a bidirectional encoder the first noun has the relation, too."""
    _, prompt = scenes.sample_caption(rng.choice(CAPTIONS), rng, PAIRS)
    relation = prompt.relation
    relations = (relation, OPPOSITE.get(relation)) if bidirectional else (None, relation)
    pairs = zip(prompt.mentions, (*relations, None, None))
    return LabelledPrompt([prompt.text], [facts_of(*pair) for pair in pairs])


def sample_answer(rng):
    """Draw a scene, and a question with its answer as text."""
    scene, question = programs.sample_question(rng.choice(programs.QUESTIONS), rng, PAIRS)
    return scene, f"Q: {question.text} A: {programs.answer(question, scene)}"


def text_of(kind, rng):
    """Draw a LabelledPrompt of one text. kind: a key of TEXTS."""
    if kind == "caption":
        return caption_text(rng)
    if kind == "question":
        return LabelledPrompt([sample_answer(rng)[1]], None)
    if kind == "sentence":
        return LabelledPrompt([rng.choice(SENTENCES)], [])
    if kind == "edit":
        edit = edits.sample_edit(rng.choice((*edits.EDITS, *edits.HARD_EDITS)), rng, PAIRS)
        return LabelledPrompt([edit.text], list(map(facts_of, edit.mentions)))
    if kind == "long":
        _, prompt = programs.sample_long(rng, PAIRS)
        return LabelledPrompt([prompt.text], list(map(facts_of, prompt.mentions)))
    _, prompt = programs.sample_semantic(rng, PAIRS)
    return LabelledPrompt([prompt.text], list(map(facts_of, prompt.told)))


TEXTS = {"caption": 8, "long": 2, "semantic": 3, "edit": 5, "question": 3, "sentence": 1}  # shares


def sample_texts(n, rng):
    """Draw n LabelledPrompts of one text each, for the T5."""
    return [text_of(kind, rng) for kind in rng.choices(list(TEXTS), TEXTS.values(), k=n)]


# ---- texts and pictures -------------------------------------------------------------------------


def tokens_of(scene):
    """The labels of the 3 x 3 tokens of a scene's picture."""
    tokens = [(scene.background, (0,) * len(FACTS))] * 9
    for o in scene.objects:
        tokens[o.place] = o.shape, facts_of(as_mention(o, place=True))
    return tokens


def object_tokens(objects):
    """The labels of pictures of one object each."""
    return [(o.shape, facts_of(as_mention(o))) for o in objects]


def described(scene):
    """The full caption of a scene, and the facts of its nouns."""
    return scenes.describe(scene), [facts_of(as_mention(o, place=True)) for o in scene.objects]


def prefixed(text, rng):
    return LabelledPrompt([rng.choice(PREFIXES[:2]) + text.prompt[0]], text.nouns)


def short_prompt(rng):
    caption = rng.random() < 0.7
    return prefixed(caption_text(rng, False) if caption else text_of("semantic", rng), rng)


def long_prompt(rng):
    return prefixed(text_of("long", rng), rng)


def picture_prompt(rng):
    scene = scenes.sample_scene(rng.choice(CAPTIONS), rng, PAIRS)
    text, nouns = described(scene)
    prompt = [rng.choice(PREFIXES), scenes.render(scene), text]
    return LabelledPrompt(prompt, nouns, tokens_of(scene))


def question_prompt(rng):
    scene, text = sample_answer(rng)
    return LabelledPrompt([scenes.render(scene), text], None, tokens_of(scene))


def edit_prompt(rng):
    """An edit. Its noun has the facts of the source object, its last word those of the target."""
    edit = edits.sample_edit(rng.choice(edits.EDITS), rng, PAIRS)
    prompt, _ = apply_task("edit", [scenes.render(edit.source), edit.text])
    text, nouns = described(edit.target)
    text, nouns = (f": {text}", nouns) if rng.random() < 0.5 else ("", [])
    if edit.before:
        nouns = [facts_of(as_mention(edit.before, 0, place=True)), *nouns]
    elif edit.after:
        nouns = [facts_of(as_mention(edit.after)), *nouns]
    outcome = facts_of(as_mention(edit.after, place=True)) if edit.after else None
    return LabelledPrompt([*prompt, text], nouns, tokens_of(edit.source), outcome=outcome)


def hard_edit_prompt(rng):
    """An edit of HARD_EDITS, then the full caption of its target."""
    edit = edits.sample_edit(rng.choice(edits.HARD_EDITS), rng, PAIRS)
    prompt, _ = apply_task("edit", [scenes.render(edit.source), edit.text])
    prompt.append(f": {scenes.describe(edit.target)}")
    return LabelledPrompt(prompt, None, tokens_of(edit.source))


def object_prompt(rng):
    """A Reference. The words before a picture of an object add to the facts of its token."""
    reference = programs.sample_reference(rng, PAIRS)
    background, segments = reference.scene.background, reference.segments
    segments = [(text, [scenes.portrait(o, background)] if o else []) for text, o in segments]
    task, prompt = reference_prompt(segments, rng.random() < 0.5)
    names = {o: text for text, o in reference.segments if o}
    vit_tokens = object_tokens(names)
    nouns, image_tokens = [], []
    if task == "combine":  # all names, each with its picture, come before the text
        nouns, image_tokens = [facts_of(as_mention(o, color=False)) for o in names], [*vit_tokens]
    for i, (o, mention) in enumerate(zip(reference.objects, reference.prompt.mentions)):
        relation = reference.prompt.relation if i == 1 else None
        if task == "combine" or o not in names:
            nouns.append(facts_of(mention, relation))
            continue
        if names[o]:
            nouns.append(facts_of(replace(mention, color=None), relation))
        image_tokens.append((o.shape, facts_of(mention, relation)))
    return LabelledPrompt(apply_task(task, prompt)[0], nouns, image_tokens, vit_tokens)


def mixing_prompt(rng):
    """The shape of one picture in the color of another; the second token has the result's facts.

    The word of the first token is what its picture gives to the result: "shape" or "color".
    """
    a, b = rng.sample(PAIRS, 2)
    if rng.random() < 0.5:
        first, second, result = "color", "shape", Mention(b[1], a[0])
    else:
        first, second, result = "shape", "color", Mention(a[1], b[0])
    objects = [Object(*pair, rng.randrange(9)) for pair in (a, b)]
    pictures = [scenes.portrait(o, rng.choice(list(scenes.BACKGROUNDS))) for o in objects]
    prompt = [f"the {first} of ", pictures[0], f" in the {second} of ", pictures[1]]
    text = f": {scenes.phrase(result)}" if rng.random() < 0.7 else ""
    image_tokens = [(first, None), (result.shape, facts_of(result))]
    prompt = [*apply_task("objects", prompt)[0], text]
    nouns = [facts_of(result)] if text else []
    return LabelledPrompt(prompt, nouns, image_tokens, object_tokens(objects))


GROUPS = (  # {kind: share}, by length: batches of similar lengths have less padding to compute
    {short_prompt: 4},
    {picture_prompt: 3, question_prompt: 2, object_prompt: 3, mixing_prompt: 1},
    {edit_prompt: 4, hard_edit_prompt: 1, long_prompt: 0.5},
)


def sample_lessons(n, rng):
    """Draw n LabelledPrompts of one group, for the LMM."""
    (group,) = rng.choices(GROUPS, [sum(group.values()) for group in GROUPS])
    return [kind(rng) for kind in rng.choices(list(group), group.values(), k=n)]
