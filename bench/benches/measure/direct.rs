//! Direct messages: the same pages of a short stream and of a long one, request by request in turn,
//! beside what the same rows cost by SQL alone and beside an echo of as many bytes. A page has to
//! cost what it holds, not what exists.

use std::time::{Duration, Instant};

use async_nats::Client;
use bytes::Bytes;
use futures::StreamExt;
use sqlx::Postgres;
use sqlx::pool::PoolConnection;

use crate::Plan;
use crate::ingest::{Ingest, ROOMS};
use crate::numbers::{milliseconds, percentile, rounded, scattered, table};
use crate::users::{DESK, Directs, Newest, WAITING, room, talks, user};
use protocol::endpoints::{DM_HISTORY, DM_INBOX, UNREAD};
use protocol::header;
use protocol::message::Message;
use protocol::receipt::Unread;
use protocol::sync::SyncPage;
use testing::{Process, World};

const ECHO: &str = "measure.echo";
const FUNCTIONS: [&str; 3] = ["sync-messages", "track-receipts", "get-history"];
/// Messages in an inbox page and in a history page by default.
const INBOX: usize = 100;
const HISTORY: usize = 50;
/// The median of the long stream may be so many times that of the short one.
const REQUIRED: f64 = 2.0;

const INBOX_BY_SQL: &str = "
    select seq, room_id, sender, recipient, id, text, sent_at, deleted from messages
     where recipient is not null and (recipient, seq) > ($1, $2)
        and (recipient, seq) <= ($1, 9223372036854775807)
     order by recipient, seq limit 100";
const UNREAD_BY_SQL: &str = "
    select room_id, count(*) from messages
     where recipient is not null and (recipient, seq) > ($1, $2)
        and (recipient, seq) <= ($1, 9223372036854775807) and not deleted
     group by room_id";
const HISTORY_BY_SQL: &str = "
    select seq, sender, recipient, id, text, sent_at, deleted from messages
     where (room_id, seq) > ((select id from rooms where name = $1), 0)
       and (room_id, seq) <= ((select id from rooms where name = $1), 9223372036854775807)
     order by room_id desc, seq desc limit 50";

/// One log with everything that answers for it.
struct Side {
    world: World,
    directs: Directs,
    newest: Newest,
    asker: Client,
    database: PoolConnection<Postgres>,
    _functions: Vec<Process>,
}

/// What is requested.
enum ParseRequest {
    Inbox(String),
    Unread(String),
    History(String, String),
}

type Kind = (&'static str, fn(u64) -> ParseRequest);

/// How long it took: through the function, by SQL alone, and an echo of as many bytes.
#[derive(Default)]
struct Took {
    function: Vec<Duration>,
    sql: Vec<Duration>,
    echo: Vec<Duration>,
}

const QUESTIONS: [Kind; 6] = [
    ("`chat.inbox.{u}`, anybody's", |n| {
        ParseRequest::Inbox(user(scattered(n)))
    }),
    ("`chat.inbox.{u}` of somebody in a talk", |n| {
        ParseRequest::Inbox(talker(n).0)
    }),
    ("`chat.inbox.{u}`, the first 100 of many", |_| {
        ParseRequest::Inbox(DESK.to_owned())
    }),
    ("`chat.unread.{u}`, anybody's", |n| {
        ParseRequest::Unread(user(scattered(n)))
    }),
    ("`chat.unread.{u}` of somebody in a talk", |n| {
        ParseRequest::Unread(talker(n).0)
    }),
    ("`dm.history.{u}.{peer}`, the newest 50", |n| {
        let (one, other) = talker(n);
        ParseRequest::History(one, other)
    }),
];

/// Of the nth request: both users of each talk.
fn talker(n: u64) -> (String, String) {
    let talks = talks();
    let (one, other) = talks[(n / 2) as usize % talks.len()].clone();
    if n.is_multiple_of(2) {
        (one, other)
    } else {
        (other, one)
    }
}

pub async fn measure(plan: &Plan) {
    let mut sides = [Side::start(WAITING).await, Side::start(plan.directs).await];
    let administrator = sides[1].world.client("administrator").await;
    echo(administrator.clone()).await;
    let mut rows = Vec::new();
    let mut missed = Vec::new();
    for (name, ask) in QUESTIONS {
        eprintln!("direct: {name}");
        let mut took: [Took; 2] = Default::default();
        for n in 0..plan.requests {
            // In turn, and in turn the first: whatever slows the machine down slows both.
            let first = usize::from(n.is_multiple_of(2));
            for which in [first, 1 - first] {
                sides[which]
                    .take(
                        &ask(n),
                        &administrator,
                        &mut took[which],
                        n >= plan.requests / 10,
                    )
                    .await;
            }
        }
        took.iter_mut().for_each(Took::sort);
        let [short, long] =
            [0, 1].map(|which: usize| percentile(&took[which].function, 0.5).as_secs_f64());
        let mut row = vec![name.to_owned()];
        for took in &took {
            row.push(format!(
                "{} / {}",
                milliseconds(percentile(&took.function, 0.5)),
                milliseconds(percentile(&took.function, 0.99))
            ));
        }
        row.push(format!("{:.2} ×", long / short));
        row.extend(
            took.iter()
                .map(|took| milliseconds(percentile(&took.sql, 0.5))),
        );
        row.push(milliseconds(percentile(&took[1].echo, 0.5)));
        rows.push(row);
        if long / short > REQUIRED {
            missed.push(name);
        }
    }
    let many = sides[1].newest.waiting[DESK].len();
    let [short, long] = [WAITING, plan.directs].map(|messages| rounded(messages as f64));
    let head = [
        "request",
        &format!("of {short}: p50 / p99"),
        &format!("of {long}: p50 / p99"),
        "p50, of the short stream's",
        &format!("SQL alone, {short}"),
        &format!("SQL alone, {long}"),
        "an echo",
    ];
    table(
        "Direct messages, 10,000 users, one request at a time",
        &head,
        &rows,
    );
    let verdict = if missed.is_empty() {
        "held".to_owned()
    } else {
        format!("MISSED by {}", missed.join(", "))
    };
    println!("Required: each median within {REQUIRED} × of the short stream's: {verdict}.");
    println!(
        "{} questions each, of different users; of the many, {many} wait in the long stream. Every \
         answer was checked.\n",
        plan.requests
    );
}

impl Side {
    async fn start(messages: u64) -> Side {
        eprintln!("direct: storing {messages} messages");
        let world = World::builder().administrator().start().await;
        let directs = Directs { messages };
        let pool = world.database().await;
        let asker = world.client("publisher").await;
        let begun = Instant::now();
        directs.store(&pool).await;
        eprintln!("direct: stored in {:.0} s", begun.elapsed().as_secs_f64());
        let operator = world.client("operator").await;
        Ingest {
            world: &world,
            operator,
            database: pool.clone(),
            written: 0,
            rooms: ROOMS,
            memory: Vec::new(),
        }
        .lift(messages)
        .await;
        let mut functions = Vec::new();
        for name in FUNCTIONS {
            functions.push(world.spawn(name).await);
        }
        let database = pool.acquire().await.expect("a connection");
        Side {
            newest: directs.newest(),
            world,
            directs,
            asker,
            database,
            _functions: functions,
        }
    }

    /// Asks once each way.
    async fn take(
        &mut self,
        ask: &ParseRequest,
        administrator: &Client,
        took: &mut Took,
        counts: bool,
    ) {
        let subject = ask.subject();
        let expected = self.expected(ask);
        let begun = Instant::now();
        let reply = self
            .asker
            .request(subject.clone(), Bytes::new())
            .await
            .expect("an answer");
        let function = begun.elapsed();
        let refused = reply
            .headers
            .as_ref()
            .and_then(|headers| headers.get(header::SERVICE_ERROR));
        assert!(refused.is_none(), "{subject}: {refused:?}");
        self.check(ask, &subject, &reply.payload, &expected);
        let begun = Instant::now();
        let rows = self.by_sql(ask).await;
        let sql = begun.elapsed();
        assert_eq!(rows, expected.len(), "{subject}, by SQL");
        let begun = Instant::now();
        let echoed = administrator
            .request(ECHO, reply.payload.len().to_string().into())
            .await
            .expect("an echo");
        let echo = begun.elapsed();
        assert_eq!(
            echoed.payload.len(),
            reply.payload.len(),
            "the echo of {subject}"
        );
        // The first ones prepare their statements.
        if counts {
            took.function.push(function);
            took.sql.push(sql);
            took.echo.push(echo);
        }
    }

    /// The positions in the answer; of a count, one of each conversation.
    fn expected(&self, ask: &ParseRequest) -> Vec<u64> {
        let waiting = |user: &str| self.newest.waiting.get(user).cloned().unwrap_or_default();
        match ask {
            ParseRequest::Inbox(user) => waiting(user).into_iter().take(INBOX).collect(),
            ParseRequest::History(one, other) => {
                let all = &self.newest.conversations[&room(one, other)];
                all[all.len().saturating_sub(HISTORY)..].to_vec()
            }
            ParseRequest::Unread(user) => self
                .counts(user)
                .into_iter()
                .map(|(_, _, newest)| newest)
                .collect(),
        }
    }

    /// Conversations with something unread, the newest first: name, how much, and the newest of it.
    fn counts(&self, user: &str) -> Vec<(String, u64, u64)> {
        let mut counts: Vec<(String, u64, u64)> = Vec::new();
        for &position in self.newest.waiting.get(user).into_iter().flatten() {
            let name = self.directs.room(position);
            match counts.iter_mut().find(|count| count.0 == name) {
                Some(count) => (count.1, count.2) = (count.1 + 1, position),
                None => counts.push((name, 1, position)),
            }
        }
        counts.sort_unstable_by_key(|count| std::cmp::Reverse(count.2));
        counts
    }

    fn check(&self, ask: &ParseRequest, subject: &str, payload: &[u8], expected: &[u64]) {
        match ask {
            ParseRequest::Inbox(user) => {
                let page: SyncPage = serde_json::from_slice(payload).expect("a page");
                self.directs.check(subject, &page.messages, expected);
                let more = self
                    .newest
                    .waiting
                    .get(user)
                    .is_some_and(|waiting| waiting.len() > INBOX);
                assert_eq!((page.more, page.changes.len()), (more, 0), "{subject}");
            }
            ParseRequest::History(..) => {
                let messages: Vec<Message> = serde_json::from_slice(payload).expect("a page");
                self.directs.check(subject, &messages, expected);
            }
            ParseRequest::Unread(user) => {
                let found: Unread = serde_json::from_slice(payload).expect("counts");
                let counts: Vec<(String, u64)> = self
                    .counts(user)
                    .into_iter()
                    .map(|(name, count, _)| (name, count))
                    .collect();
                assert_eq!(
                    (found.total, found.more),
                    (counts.iter().map(|count| count.1).sum(), false),
                    "{subject}"
                );
                assert_eq!(
                    found
                        .unread
                        .into_iter()
                        .map(|room| (room.room, room.count))
                        .collect::<Vec<_>>(),
                    counts,
                    "{subject}"
                );
            }
        }
    }

    /// How many rows PostgreSQL gave.
    async fn by_sql(&mut self, ask: &ParseRequest) -> usize {
        let cursor = |user: &str| {
            if user == DESK {
                0
            } else {
                self.directs.cursor() as i64
            }
        };
        let query = match ask {
            ParseRequest::Inbox(user) => sqlx::query(INBOX_BY_SQL).bind(user).bind(cursor(user)),
            ParseRequest::Unread(user) => sqlx::query(UNREAD_BY_SQL).bind(user).bind(cursor(user)),
            ParseRequest::History(one, other) => sqlx::query(HISTORY_BY_SQL).bind(room(one, other)),
        };
        query
            .fetch_all(&mut *self.database)
            .await
            .expect("rows")
            .len()
    }
}

impl ParseRequest {
    fn subject(&self) -> String {
        match self {
            ParseRequest::Inbox(user) => DM_INBOX.subject(&[user]),
            ParseRequest::Unread(user) => UNREAD.subject(&[user]),
            ParseRequest::History(one, other) => DM_HISTORY.subject(&[one, other]),
        }
    }
}

impl Took {
    fn sort(&mut self) {
        self.function.sort_unstable();
        self.sql.sort_unstable();
        self.echo.sort_unstable();
    }
}

/// Replies with as many bytes as requested, inside this process.
async fn echo(client: Client) {
    let mut requests = client
        .subscribe(ECHO)
        .await
        .expect("a client that is not closed");
    let this = client.clone();
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let Some(reply) = request.reply else { continue };
            let bytes = std::str::from_utf8(&request.payload)
                .ok()
                .and_then(|bytes| bytes.parse().ok())
                .unwrap_or(0);
            // Only a closed client fails, and then the run is over.
            let _ = client.publish(reply, vec![b' '; bytes].into()).await;
        }
    });
    // Flushed is not subscribed; answered is.
    this.request(ECHO, "1".into())
        .await
        .expect("the echo answers");
}
