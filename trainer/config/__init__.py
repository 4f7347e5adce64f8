"""The settings of the commands: a YAML file, and overrides behind it.

    python -m trainer.train trainer/configs/sd15.yaml train.steps=100 data.references=3

Paths are relative to the current folder; the environment is not read. The configuration of a training goes into every
checkpoint and into the metadata of the adapter (``config.to_json()``).
"""

from .evaluation import EvaluateSettings
from .licences import LicenceSettings, stated_licence
from .losses import IdentityLossSettings, LossSettings
from .preparation import PrepareSettings
from .sampling import SamplingSettings
from .training import (
    AdapterSettings,
    Config,
    DataSettings,
    EncoderSettings,
    LoraSettings,
    ModelSettings,
    OptimiserSettings,
    TrainSettings,
    ValidationSettings,
)

load_config = Config.load
