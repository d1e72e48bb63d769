"""The public names of this room, for type checkers; ``__init__.py`` imports each when it is first used."""

from qlora.model.base import Base as Base
from qlora.model.checkpoint import Checkpoint as Checkpoint
from qlora.model.checkpoint import find_model as find_model
from qlora.model.checkpoint import open_checkpoint as open_checkpoint
from qlora.model.config import load_config as load_config
from qlora.model.in_memory import as_base as as_base
from qlora.model.in_memory import quantise as quantise
from qlora.model.load import quantised_names as quantised_names
from qlora.model.nf4 import Linear4bit as Linear4bit
from qlora.model.nf4 import Linear8bit as Linear8bit
from qlora.model.nf4 import dense_cached as dense_cached
from qlora.model.nf4 import dense_weight as dense_weight
from qlora.model.nf4 import is_linear as is_linear
from qlora.model.tokenizer import load_tokenizer as load_tokenizer
