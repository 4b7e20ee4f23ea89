"Runs that are stopped in their middle, and what is compared afterwards."
import torch
from transformers import TrainerCallback


def weights(run):
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters() if weight.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class At(TrainerCallback):
    "Do something at the end of one step."

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do(control)


def stop(control):
    control.should_training_stop = True
