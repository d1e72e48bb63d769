"""qlora: fine-tune a large language model on the card you have.

    import qlora
    run = qlora.train(qlora.Recipe.from_yaml("quickstart.yaml"))

``__init__.pyi`` lists the public names. Each is imported when it is first used, so that ``import qlora`` is quick and
``qlora doctor`` runs without torch.
"""

from __future__ import annotations

import logging
import os
import sys

from qlora.files.late import late_names

# While it is imported, bitsandbytes advises a package of faster CPU inference kernels, which training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Between two products OpenMP's threads spin, each up to 16 ms. Where other work wants the same cores, they take the time that the
# last thread needs to finish. A fifteenth of these turns outlasts the pauses of a step all the same: an idle machine loses
# nothing. Read once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# torch reads this when it is imported: segments that grow leave fewer gaps of GPU memory that nothing fits into. Windows has none.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

__getattr__, __all__ = late_names(__file__)


def __dir__() -> list[str]:
    return __all__
