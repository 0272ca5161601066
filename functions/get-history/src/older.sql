select seq, sender, recipient, id, text, sent_at, deleted, counted from (
    select *, sum(octet_length(text)) over (order by seq desc) - octet_length(text) < $4 as fits,
           count(*) over () as counted
      from (select seq, sender, recipient, id, text, sent_at, deleted
              from messages
             where (room_id, seq) < ((select id from rooms where name = $1), $2)
               and (room_id, seq) > ((select id from rooms where name = $1), 0) and received_at > (select cutoff($1))
             order by room_id desc, seq desc limit $3) page) sized
 where fits order by seq desc
