"""The Lua scripts: each is one atomic step, safe to repeat, and answers with a word and its details.

Words: OK; FENCED and DELETED (another token); LOST and the last version, -1 when the records are gone; MISSING (no such
policy); GONE and what Redis has lost of a policy; NEWER and the format of a policy that a newer release has stored;
INTERRUPTED (another attempt took the staging key). A script checks everything before it writes anything.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1


@dataclass(frozen=True)
class Script:
    """A Lua script with the digest under which Redis caches it."""

    source: str

    @cached_property
    def sha(self) -> str:
        """Hexadecimal SHA-1 of the source."""
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


# A token that differs under a *lower* epoch than ours is no rival: Redis was rolled back behind our acquisition. Keys
# that the spec does not name are not read: Redis was rolled back behind the end of a republication. A generation of ''
# is not compared: it is about to become the spec's.
_FENCE_CHECK = """
local function fence_check(owner, token, epoch, spec, generation)
  local held = redis.call('HMGET', owner, 'token', 'epoch', 'deleted')
  if held[1] and held[1] == token then
    if generation ~= '' and redis.call('HGET', spec, 'generation') ~= generation then return {'LOST', -1} end
    return nil
  end
  if not held[2] or tonumber(held[2]) < tonumber(epoch) then return {'LOST', -1} end
  if held[3] then return {'DELETED'} end
  return {'FENCED', held[2]}
end
"""

_LAST_VERSION = """
local function last_version(log)
  if redis.call('EXISTS', log) == 0 then return nil end
  local info = redis.call('XINFO', 'STREAM', log)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return tonumber(string.match(info[i + 1], '^%d+')) end
  end
end
"""

# For a generation nobody has written yet. Stream ids start after 0-0, so the empty log of version 0 remembers 0-1; the
# version is the part before the dash.
_START_LOG = """
local function start_log(log, version)
  redis.call('XADD', log, string.format('%.0f', version) .. (version == 0 and '-1' or '-0'), '', '')
  redis.call('XTRIM', log, 'MAXLEN', 0)
end
"""

# KEYS spec, owner, log; ARGV uid, create_time, spec, generation, format. The tombstone's epoch stays.
CREATE = Script(
    _START_LOG
    + """
local held = redis.call('HMGET', KEYS[1], 'uid', 'create_time', 'spec', 'format')
if held[1] then return {'HELD', held[1], held[2], held[3], held[4]} end
if redis.call('HEXISTS', KEYS[2], 'uid') == 1 then return {'GONE', 'the specification'} end
redis.call('HSET', KEYS[1], 'uid', ARGV[1], 'create_time', ARGV[2], 'spec', ARGV[3], 'generation', ARGV[4],
  'format', ARGV[5])
redis.call('HDEL', KEYS[2], 'deleted', 'token', 'address', 'instance')
redis.call('HSETNX', KEYS[2], 'epoch', 0)
redis.call('HSET', KEYS[2], 'uid', ARGV[1], 'pages:' .. ARGV[4], 0)
redis.call('PERSIST', KEYS[2])
start_log(KEYS[3], 0)
return {'OK'}
"""
)

# KEYS spec, owner, staging; ARGV token, address, instance, epoch of the owner that may be replaced, newest format that
# can be read. Two servers that find the same owner gone cannot both replace it: the second one looks again.
ACQUIRE = Script("""
local held = redis.call('HMGET', KEYS[1], 'uid', 'generation', 'format')
if not held[1] then
  if redis.call('HEXISTS', KEYS[2], 'uid') == 1 then return {'GONE', 'the specification'} end
  return {'MISSING'}
end
if tonumber(held[3] or 0) > tonumber(ARGV[5]) then return {'NEWER', held[3]} end
if redis.call('EXISTS', KEYS[2]) == 0 then return {'GONE', 'the record of its owner'} end
if tonumber(redis.call('HGET', KEYS[2], 'epoch') or 0) ~= tonumber(ARGV[4]) then return {'HELD'} end
local epoch = redis.call('HINCRBY', KEYS[2], 'epoch', 1)
redis.call('HSET', KEYS[2], 'token', ARGV[1], 'address', ARGV[2], 'instance', ARGV[3])
redis.call('HDEL', KEYS[2], 'deleted')
redis.call('UNLINK', KEYS[3])
return {'OK', held[1], epoch, held[2], held[3]}
""")

# KEYS owner, spec; ARGV token, epoch, generation, format, spec: from here on servers that do not know it refuse.
RAISE_FORMAT = Script(
    _FENCE_CHECK
    + """
local refusal = fence_check(KEYS[1], ARGV[1], ARGV[2], KEYS[2], ARGV[3])
if refusal then return refusal end
redis.call('HSET', KEYS[2], 'format', ARGV[4], 'spec', ARGV[5])
return {'OK'}
"""
)

# KEYS owner; ARGV token. The epoch stays; the former owner's late writes are fenced.
RELEASE = Script("""
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('HDEL', KEYS[1], 'token', 'instance') end
return {'OK'}
""")

# KEYS lock; ARGV token.
UNLOCK = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return {'OK'}
""")

# KEYS spec, owner, staging; ARGV uid or ''. Pages and log are unlinked afterwards, as a generation nobody refers to.
DELETE = Script("""
local uid = redis.call('HGET', KEYS[1], 'uid')
if not uid then
  local buried = redis.call('HGET', KEYS[2], 'deleted')
  if buried and buried == ARGV[1] then return {'OK', buried} end
  return {'MISSING'}
end
if ARGV[1] ~= '' and ARGV[1] ~= uid then return {'MISSING'} end
redis.call('HSET', KEYS[2], 'deleted', uid)
redis.call('HSETNX', KEYS[2], 'epoch', 0)
redis.call('HDEL', KEYS[2], 'uid', 'token', 'address', 'instance')
redis.call('UNLINK', KEYS[1], KEYS[3])
return {'OK', uid}
""")

# KEYS owner; ARGV seconds. Once a deleted policy has left nothing else: its tombstone need not stay for ever.
BURY = Script("""
if redis.call('HEXISTS', KEYS[1], 'deleted') == 1 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return {'OK'}
""")

# KEYS spec, owner. Answers generation, pages, generation, pages, ... of those that no spec refers to.
GARBAGE = Script("""
local current = redis.call('HGET', KEYS[1], 'generation')
local held = redis.call('HGETALL', KEYS[2])
local found = {'OK'}
for i = 1, #held, 2 do
  local generation = string.match(held[i], '^pages:(.*)$')
  if generation and generation ~= current then
    found[#found + 1] = generation
    found[#found + 1] = held[i + 1]
  end
end
return found
""")

# KEYS owner, log, spec; ARGV token, epoch, generation, version of the first entry, then per entry: number of strings,
# the strings.
# Entries the log has already are skipped: the same token means the same writer, hence the same entries.
APPEND = Script(
    _FENCE_CHECK
    + _LAST_VERSION
    + """
local refusal = fence_check(KEYS[1], ARGV[1], ARGV[2], KEYS[3], ARGV[3])
if refusal then return refusal end
local last = last_version(KEYS[2])
if not last then return {'LOST', -1} end
local version = tonumber(ARGV[4])
if last < version - 1 then return {'LOST', last} end
local at = 5
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  if version > last then
    redis.call('XADD', KEYS[2], string.format('%.0f-0', version), unpack(ARGV, at + 1, at + count))
  end
  at = at + count + 1
  version = version + 1
end
return {'OK'}
"""
)

# KEYS owner, log, spec; ARGV token, epoch, generation, first version to keep.
TRIM = Script(
    _FENCE_CHECK
    + """
local refusal = fence_check(KEYS[1], ARGV[1], ARGV[2], KEYS[3], ARGV[3])
if refusal then return refusal end
return {'OK', redis.call('XTRIM', KEYS[2], 'MINID', ARGV[4] .. '-0')}
"""
)

# KEYS log.
LOG_STATE = Script(
    _LAST_VERSION
    + """
local last = last_version(KEYS[1])
if not last then return {'LOST', -1} end
return {'OK', last, redis.call('XLEN', KEYS[1]), redis.call('MEMORY', 'USAGE', KEYS[1])}
"""
)

# How many pages of a batch Redis has taken, and still has: a Redis that was rolled back in between counts fewer.
_BATCHED = """
local function batched(owner, batch)
  local held = redis.call('HMGET', owner, 'batch', 'batched')
  return held[1] == batch and tonumber(held[2]) or 0
end
"""

# KEYS owner, staging, target, spec, log, manifest; ARGV token, epoch, generation, attempt, first ('1' or ''), last ('1'
# or ''), version of what is written, batch, pages that the batch must have ('' for a page, which adds to them),
# generation that is written, index of the page, then fields and values. A late command of an abandoned attempt finds
# another attempt's name in the staging key and changes nothing, so pages are never mixed. Nothing is written that is
# ahead of the log.
STAGE = Script(
    _FENCE_CHECK
    + _LAST_VERSION
    + _BATCHED
    + """
local refusal = fence_check(KEYS[1], ARGV[1], ARGV[2], KEYS[4], ARGV[3])
if refusal then return refusal end
if ARGV[5] == '1' then
  redis.call('UNLINK', KEYS[2])
  redis.call('HSET', KEYS[2], 'attempt', ARGV[4])
elseif redis.call('HGET', KEYS[2], 'attempt') ~= ARGV[4] then
  return {'INTERRUPTED'}
end
redis.call('HSET', KEYS[2], unpack(ARGV, 12))
if ARGV[6] == '1' then
  local last = last_version(KEYS[5])
  if not last then return {'LOST', -1} end
  if last < tonumber(ARGV[7]) then return {'LOST', last} end
  local count = batched(KEYS[1], ARGV[8])
  if ARGV[9] ~= '' then
    if count ~= tonumber(ARGV[9]) then return {'LOST', last} end
  else
    redis.call('HSET', KEYS[1], 'batch', ARGV[8], 'batched', count + 1)
  end
  redis.call('HDEL', KEYS[2], 'attempt')
  if ARGV[9] ~= '' then
    redis.call('HSET', KEYS[1], 'header:' .. ARGV[10], ARGV[7])
  else
    local pages = tonumber(redis.call('HGET', KEYS[1], 'pages:' .. ARGV[10]) or 0)
    if tonumber(ARGV[11]) >= pages then redis.call('HSET', KEYS[1], 'pages:' .. ARGV[10], ARGV[11] + 1) end
    local added = redis.call('HSET', KEYS[6], ARGV[11], ARGV[7])
    if added == 1 then redis.call('HINCRBY', KEYS[1], 'manifest:' .. ARGV[10], 1) end
  end
  redis.call('RENAME', KEYS[2], KEYS[3])
end
return {'OK'}
"""
)

# What keeps an owner from republishing: another policy of the name, or an owner that came after it.
_RIVAL = """
local function rival(spec, owner, uid, token, epoch)
  local stored = redis.call('HGET', spec, 'uid')
  if stored and stored ~= uid then return {'FENCED'} end
  local known = redis.call('HGET', owner, 'uid')
  if not stored and known and known ~= uid then return {'GONE', 'the specification'} end
  local held = redis.call('HMGET', owner, 'token', 'epoch', 'deleted')
  if (held[1] and held[1] == token) or not held[2] or tonumber(held[2]) < tonumber(epoch) then return nil end
  if held[3] then return {'DELETED'} end
  return {'FENCED', held[2]}
end
"""

# KEYS spec, owner, staging, log of the new generation; ARGV uid, token, epoch, address, new generation, version,
# instance.
REPUBLISH_BEGIN = Script(
    _RIVAL
    + _START_LOG
    + """
local refusal = rival(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3])
if refusal then return refusal end
redis.call('HSET', KEYS[2], 'token', ARGV[2], 'epoch', ARGV[3], 'address', ARGV[4], 'instance', ARGV[7])
redis.call('HDEL', KEYS[2], 'deleted')
redis.call('PERSIST', KEYS[2])
redis.call('HSETNX', KEYS[2], 'pages:' .. ARGV[5], 0)
redis.call('UNLINK', KEYS[3])
start_log(KEYS[4], tonumber(ARGV[6]))
return {'OK'}
"""
)

# KEYS spec, owner, log of the new generation; ARGV uid, token, epoch, create_time, spec, new generation, batch, its
# pages, format.
REPUBLISH_END = Script(
    _FENCE_CHECK
    + _RIVAL
    + _BATCHED
    + """
local refusal = rival(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3])
  or fence_check(KEYS[2], ARGV[2], ARGV[3], KEYS[1], '')
if refusal then return refusal end
if redis.call('EXISTS', KEYS[3]) == 0 then return {'LOST', -1} end
if batched(KEYS[2], ARGV[7]) ~= tonumber(ARGV[8]) then return {'LOST', -1} end
redis.call('HSET', KEYS[1], 'uid', ARGV[1], 'create_time', ARGV[4], 'spec', ARGV[5], 'generation', ARGV[6],
  'format', ARGV[9])
redis.call('HSET', KEYS[2], 'uid', ARGV[1])
return {'OK'}
"""
)
