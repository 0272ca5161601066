select least(delivered.at, read.at), read.at
  from unnest($2::bigint[], $3::text[]) with ordinality as asked (seq, recipient, place)
  left join lateral (select at from receipt_moves
                      where reader = recipient and room is null and through >= asked.seq
                      order by through limit 1) delivered on true
  left join lateral (select at from receipt_moves
                      where reader = recipient and room = $1 and through >= asked.seq
                      order by through limit 1) read on true
 order by place
