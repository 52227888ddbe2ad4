"""Ask the record validation of the published Petals what it accepts; run by its own interpreter.

Reads one JSON list of hex strings (msgpack values) from stdin, prints one list: true (accepted), or the error's text.
Only the module with the records is loaded, since the whole package takes ten seconds to import.
"""

import importlib.util
import json
import sys

import hivemind
import pydantic.v1
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer

hivemind.PeerID = PeerID
sys.modules["pydantic"] = pydantic.v1
folder = importlib.util.find_spec("petals").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("petals_records", f"{folder}/data_structures.py")
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)


def verdict(raw: bytes) -> object:
    try:
        info = records.ServerInfo.from_tuple(MSGPackSerializer.loads(raw))
        return MSGPackSerializer.dumps(info.to_tuple()).hex()
    except (TypeError, ValueError) as error:  # what Petals itself catches, entry by entry
        return {"rejected": str(error)}


print(json.dumps([verdict(bytes.fromhex(text)) for text in json.load(sys.stdin)]))
