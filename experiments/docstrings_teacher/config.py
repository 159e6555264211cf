"""The packaged teacher: a Llama of 4.07M parameters, trained on all tokens of the docstrings dataset."""

from ml_collections import ConfigDict

from configs import base, settings


def get_config() -> ConfigDict:
    config = settings.get("docstrings")
    config.steps = 1600
    config.learning_rate = ConfigDict(
        dict(
            name="warmup_cosine_decay_schedule",
            init_value=0.0,
            peak_value=2e-3,
            warmup_steps=50,
            decay_steps=config.get_ref("steps"),
            end_value=2e-5,
        )
    )
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    config.teacher.path = ""
    config.tokenizer.path = "package:docstrings_teacher"
    config.student.config = ConfigDict(
        dict(family="llama", hidden_size=256, num_layers=4, num_heads=4, intermediate_size=640, max_positions=256)
    )
    config.data.packing = "stream"
    config.eval_every = 200
    config.checkpoint_every = 200
    return base.set_terms(config, hard_labels=base.hard_labels())
