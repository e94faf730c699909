"""Direct-connect topologies: exact cost of breadth-first broadcast, a catalogue, expansions, and a finder."""

from trainkit.collectives.direct._bfb import BFB as BFB
from trainkit.collectives.direct._bfb import bfb as bfb
from trainkit.collectives.direct._cabling import Cable as Cable
from trainkit.collectives.direct._catalog import members as members
from trainkit.collectives.direct._digraph import Digraph as Digraph
from trainkit.collectives.direct._expansions import carry_to_degree as carry_to_degree
from trainkit.collectives.direct._expansions import carry_to_line as carry_to_line
from trainkit.collectives.direct._expansions import carry_to_power as carry_to_power
from trainkit.collectives.direct._finder import Progress as Progress
from trainkit.collectives.direct._finder import find_topologies as find_topologies
from trainkit.collectives.direct._frontier import FoundTopology as FoundTopology
from trainkit.collectives.direct._frontier import Frontier as Frontier
from trainkit.collectives.direct._frontier import least_steps as least_steps
from trainkit.collectives.direct._frontier import named_topology as named_topology
from trainkit.collectives.direct._transfers import Transfers as Transfers
