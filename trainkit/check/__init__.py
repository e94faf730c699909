"""The self-test: each part that can run on this machine does its work once, and is held to a result known otherwise."""

from trainkit.check._run import CHECKS as CHECKS
from trainkit.check._run import Check as Check
from trainkit.check._run import check as check
