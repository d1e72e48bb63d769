"""The public names of this room, for type checkers; ``__init__.py`` imports each when it is first used."""

from qlora.export.adapter import export_adapter as export_adapter
from qlora.export.gguf import Written as Written
from qlora.export.gguf import export_gguf as export_gguf
from qlora.export.gguf import export_gguf_adapter as export_gguf_adapter
from qlora.export.merged import Merged as Merged
from qlora.export.merged import merge as merge
from qlora.export.nf4 import export_nf4 as export_nf4
