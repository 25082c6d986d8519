"""An endless dataset of rendered scenes, `Examples`, and every name of `mini.scenes`.

Without a manifest, training uses `Examples`, which needs no files.
"""

import numpy as np

from mini import scenes
from mini.edits import EDITS, sample_edit
from mini.programs import QUESTIONS, answer, reference_record, sample_question, sample_reference
from mini.scenes import *
from mini.scenes import describe, render

SEGMENT, EDGES = "Segment the image.", "Draw the edges."


class Examples:
    """An endless dataset with the interface of `data.Manifest`; its one row is always random."""

    name = identity = "rendered scenes"
    bad_lines, total = {}, 0

    def __init__(self, perception=False):
        """perception: one third of the edits have a segmentation or an edge map as target."""
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
            record = {"source": render(edit.source), "instruction": edit.text}
            record |= {"target": render(edit.target), "caption": describe(edit.target)}
        elif task == "answer":
            scene, question = sample_question(rng.choice(QUESTIONS), rng)
            record = {"image": render(scene), "question": question.text}
            record["answer"] = answer(question, scene)
        elif task == "objects":
            record = reference_record(sample_reference(rng))
        else:
            kind = rng.choice((*scenes.TASKS, "scene"))
            scene, prompt = scenes.sample_caption(kind, rng)
            record = {"prompt": prompt.text, "target": render(scene), "caption": describe(scene)}
        return record | {"task": task}


def perceived(rng):
    """An edit example whose target is the edges (one in four) or segmentation of a scene."""
    scene = scenes.sample_scene(rng.choice((*scenes.TASKS, "scene")), rng)
    labels, record = scenes.segment(scene), {"task": "edit", "source": render(scene)}
    if rng.random() < 0.25:
        places = ", ".join(f"{scenes.PLACES[o.place]} {o.shape}" for o in scene.objects)
        record |= {"instruction": EDGES, "target": scenes.edges(scene)}
        return record | {"caption": f"edges {places}"}
    if scenes.is_reserved(labels):
        return perceived(rng)
    record |= {"instruction": SEGMENT, "target": render(labels)}
    return record | {"caption": describe(labels)}
