"""Learning from rewards, and sampling on the prompts of tasks.

session.py      put a GRPO run together                   step.py         GRPO's step in the training loop
collect.py      rollouts of a step, with rewards          journal.py      what was drawn, for after a kill
samples.py      samples, what they are worth              advantages.py   rewards to advantages
rows.py         samples as packed rows on the device      losses.py       the policy loss
updates.py      the updates of a step                     position.py     how far a run has come
untrained.py    samples that teach nothing                report.py       what metrics and logs say of a step
evaluation.py   evaluation in the loop                    generation.py   samples of many prompts, without training
prompts.py      prompts, scorer and texts of a mix        turns.py        replies of tasks
replica.py      the ranks that hold one copy of a model   replay.py       one rollout drawn again
settings.py     what a GRPO and a generation are told
"""
