-- One decision about what one key may use: fills its two buckets, looks whether there is enough in both, and takes it.
-- Atomic, since Redis runs one script at a time, and by the clock of Redis, so that routers need not agree on theirs.
-- The arithmetic is that of bucket.rs; a test holds them side by side.
--
-- KEYS[1]  the key's hash: requests and tokens (what is left in each bucket), at (microseconds, when that was so)
-- ARGV     requests a minute, tokens a minute (0: no limit), requests wanted, tokens wanted (below 0: given back),
--          and "take", or "settle" for what was used whether it was there or not
-- returns  0, or 1 if requests or 2 if tokens are short; what is left of each, as text: Redis would cut off fractions
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local limits = {tonumber(ARGV[1]), tonumber(ARGV[2])}
local wanted = {tonumber(ARGV[3]), tonumber(ARGV[4])}
local kept = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local at = tonumber(kept[3] or now)
local levels = {}
local short = 0
for i = 1, 2 do
    local level = tonumber(kept[i] or limits[i]) + math.max(now - at, 0) * limits[i] / 60000000
    levels[i] = math.min(level, limits[i])
    if short == 0 and limits[i] > 0 and levels[i] < wanted[i] then
        short = i
    end
end
if short == 0 or ARGV[5] == 'settle' then
    short = 0
    local full = 0
    for i = 1, 2 do
        if limits[i] > 0 then
            levels[i] = math.min(levels[i] - wanted[i], limits[i])
            full = math.max(full, (limits[i] - levels[i]) * 60000 / limits[i])
        end
    end
    local text = function(number) return string.format('%.17g', number) end
    redis.call('HSET', KEYS[1], 'requests', text(levels[1]), 'tokens', text(levels[2]), 'at', text(math.max(now, at)))
    -- A bucket that is full is as good as none.
    redis.call('PEXPIRE', KEYS[1], math.ceil(full) + 1000)
end
return {short, string.format('%.17g', levels[1]), string.format('%.17g', levels[2])}
