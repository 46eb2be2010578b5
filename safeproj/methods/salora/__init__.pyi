"""What `safeproj.salora` offers; imported on first use, see `safeproj.exports`."""

from safeproj.lm.data import Data as Data
from safeproj.lm.data import read_data as read_data
from safeproj.methods.salora.callback import FoldCallback as FoldCallback
from safeproj.methods.salora.constraint import Constraint as Constraint
from safeproj.methods.salora.constraint import constrain as constrain
from safeproj.methods.salora.directions import Directions as Directions
from safeproj.methods.salora.folding import Folded as Folded
from safeproj.methods.salora.folding import fold as fold
from safeproj.methods.salora.initialisation import Initial as Initial
from safeproj.methods.salora.initialisation import attach as attach
from safeproj.methods.salora.initialisation import initialise as initialise
from safeproj.methods.salora.module import SafetyModule as SafetyModule
from safeproj.methods.salora.module import safety_module as safety_module
