"""The miniature world: all that `mini.scenes` offers, and endless examples of it to train on."""

import numpy as np

from mini.edits import EDITS, sample_edit
from mini.programs import QUESTIONS, answer, reference_record, sample_question, sample_reference
from mini.scenes import *
from mini.scenes import (
    PLACES,
    TASKS,
    describe,
    edges,
    is_exam,
    render,
    sample_caption,
    sample_scene,
    segment,
)

SEGMENT, EDGES = "Segment the image.", "Draw the edges."


class Examples:
    """Endless training examples, with the interface of `data.Manifest`: one row, another each time."""

    name = identity = "rendered scenes"
    bad_lines, total = {}, 0

    def __init__(self, perception=False):
        """perception: are a third of the edits segmentations and edges?"""
        self.perception = perception

    def rows(self, task):
        return np.array([1])

    def ratio(self, row):
        return 1.0

    def record(self, row, task, rng):
        if task == "edit" and self.perception and rng.random() < 1 / 3:
            return perceived(rng)
        if task == "edit":
            edit = sample_edit(rng.choice(EDITS), rng)
            source, target = render(edit.source), render(edit.target)
            record = {"task": task, "source": source, "instruction": edit.text, "target": target}
            return record | {"caption": describe(edit.target)}
        if task == "answer":
            scene, question = sample_question(rng.choice(QUESTIONS), rng)
            record = {"task": task, "image": render(scene), "question": question.text}
            return record | {"answer": answer(question, scene)}
        if task == "objects":
            return reference_record(sample_reference(rng))
        scene, prompt = sample_caption(rng.choice((*TASKS, "scene")), rng)
        record = {"task": task, "prompt": prompt.text, "target": render(scene)}
        return record | {"caption": describe(scene)}


def perceived(rng):
    """An edit that makes of a scene its segmentation or, one in four, its edges."""
    scene = sample_scene(rng.choice((*TASKS, "scene")), rng)
    record = {"task": "edit", "source": render(scene)}
    if rng.random() < 0.25:
        places = ", ".join(f"{PLACES[o.place]} {o.shape}" for o in scene.objects)
        return record | {"instruction": EDGES, "target": edges(scene), "caption": f"edges {places}"}
    if is_exam(labels := segment(scene)):
        return perceived(rng)
    return record | {
        "instruction": SEGMENT,
        "target": render(labels),
        "caption": describe(labels),
    }
