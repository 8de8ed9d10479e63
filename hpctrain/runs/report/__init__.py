"""One page of a run: curves over the whole chain, links, lost work, cost. Needs the extra `report`
(pandas, matplotlib)."""
