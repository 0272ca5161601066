-- As receipt_history_read.sql, for the delivered cursor over all conversations of a reader. It
-- keeps an entry as long as the longest of those conversations that have a retention of their own.
with scanned as materialized (
    select name as reader from users
     where name > $1 and delivered > 0 and $2 = '' order by name limit $4
), own as materialized (
    select split_part(room, '.', 2) as one, split_part(room, '.', 3) as other,
           cutoff(room) as cutoff
      from retention where starts_with(room, 'dm.') and room <> 'dm.*'
), cursors as (
    select scanned.reader, coalesce(first.seq, 9223372036854775807) as first
      from scanned
      left join lateral (select seq from messages
                          where recipient is not null and (recipient, seq) > (scanned.reader, 0)
                            and (recipient, seq) <= (scanned.reader, 9223372036854775807)
                          order by recipient, seq limit 1) first on true
), due as materialized (
    select entry.place
      from cursors
     cross join lateral (select place, at
                           from (select ctid as place, at from receipt_moves
                                  where reader = cursors.reader and room is null
                                    and through < cursors.first
                                  order by reader, room, through limit $5) candidate
                          where at <= (select least(cutoff('dm.*'), min(cutoff)) from own
                                        where cursors.reader in (one, other)) limit $5) entry
     limit $5
), deleted as (
    delete from receipt_moves where not $3 and ctid = any(array(select place from due))
)
select (select count(*) from due), last.reader, ''
  from (select) one
  left join (select reader from scanned order by reader desc limit 1) last on true
