"""Everything beside the published Petals: its client on our servers, ours on its servers, and both in one chain."""
