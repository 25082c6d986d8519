"""The miniature world: all that `mini.scenes` offers, and endless examples of it to train on."""

import numpy as np

from mini.edits import EDITS, sample_edit
from mini.programs import QUESTIONS, answer, reference_record, sample_question, sample_reference
from mini.scenes import *
from mini.scenes import TASKS, describe, render, sample_caption


class Examples:
    """Endless training examples, with the interface of `data.Manifest`: one row, another each time."""

    name = identity = "rendered scenes"
    bad_lines, total = {}, 0

    def rows(self, task):
        return np.array([1])

    def ratio(self, row):
        return 1.0

    def record(self, row, task, rng):
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
        return {"task": task, "prompt": prompt.text, "target": render(scene)}
