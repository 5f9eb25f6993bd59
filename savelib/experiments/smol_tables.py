"""The table of rules on stored responses of SmolLM2: `python -m savelib.experiments.smol_tables`."""

import pandas as pd

from savelib.config import make_config
from savelib.experiments.stored_responses import changes, collect
from savelib.experiments.tables import Tables


def _stored_responses() -> pd.DataFrame:
    config = make_config(profile="smol")
    return changes(collect(config), config)


TABLES = Tables("smol", {"stored_responses": _stored_responses}, "five minutes on one core")

if __name__ == "__main__":
    TABLES.main()
