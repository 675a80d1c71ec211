"""Batched text generation: requests, the compiled loop, host pages, and the functions that users call."""

from paxcache._generate._api import Generation as Generation
from paxcache._generate._api import Stream as Stream
from paxcache._generate._api import generate as generate
from paxcache._generate._api import stream as stream
from paxcache._generate._loop import StopReason as StopReason
