"""The public names of this room, for type checkers; ``__init__.py`` imports each when it is first used."""

from qlora.data.batches import collate as collate
from qlora.data.batches import step_rows as step_rows
from qlora.data.batches import steps_per_epoch as steps_per_epoch
from qlora.data.examples import Example as Example
from qlora.data.load import Data as Data
from qlora.data.load import Prompt as Prompt
from qlora.data.load import load_data as load_data
from qlora.data.packing import Row as Row
from qlora.data.preview import Preview as Preview
from qlora.data.report import Counts as Counts
from qlora.data.report import Report as Report
from qlora.model.loss import IGNORE_INDEX as IGNORE_INDEX
