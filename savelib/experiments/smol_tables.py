"""The table of rules on stored responses of SmolLM2: `python -m savelib.experiments.smol_tables`."""

import pandas as pd

from savelib.config import make_config
from savelib.experiments.stored_responses import changes, collect, fine_tuned
from savelib.experiments.tables import Tables


def _stored_responses() -> pd.DataFrame:
    config = make_config(profile="smol")
    return changes({"frozen": collect(config), "fine-tuned": collect(fine_tuned(config))}, config)


TABLES = Tables("smol", {"stored_responses": _stored_responses}, "15 minutes on one core")

if __name__ == "__main__":
    TABLES.main()
