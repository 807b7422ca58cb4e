"""Libraries' lines that help nobody stay off the screen."""

import logging

from minicpm_tune.logs import silence_libraries


def test_libraries_lines_that_help_nobody_are_left_out(monkeypatch):
    silence_libraries()
    silence_libraries()
    logger = logging.getLogger("transformers.integrations.hub_kernels")
    assert len(logger.filters) == 1
    record = logging.makeLogRecord(
        {
            "name": logger.name,
            "msg": "`x` is falling back to its reference PyTorch implementation because ...",
        }
    )
    for gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert bool(logger.filter(record)) == gpu
    told = logging.makeLogRecord(
        {"name": "DeepSpeed", "msg": "Setting accelerator to CPU. If you have GPU ..."}
    )
    assert not logging.getLogger("DeepSpeed").filter(told)
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)
