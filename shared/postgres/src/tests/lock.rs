//! Advisory locks: one replica works, the other one learns that it does not.

use sqlx::PgConnection;
use tokio::sync::oneshot;

use super::*;
use crate::lock::{with_session_lock, with_transaction_lock};

const KEY: i64 = 7;

async fn insert(connection: &mut PgConnection) -> Result<(), DatabaseError> {
    sqlx::query("insert into written values (1)")
        .execute(connection)
        .await?;
    Ok(())
}

async fn written(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from written")
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn locks(pool: &PgPool) -> i64 {
    let sql = "select count(*) from pg_locks join pg_database on pg_database.oid = database \
               where locktype = 'advisory' and datname = current_database()";
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

async fn no_lock_is_held(pool: &PgPool) {
    let released = async || (locks(pool).await == 0).then_some(());
    eventually("the lock is released", SOON, released).await;
}

#[tokio::test]
async fn only_one_transaction_holds_a_lock() {
    let world = World::bare().await;
    let pool = world.database().await;
    let database = connect(&world.database_url());
    execute(&pool, "create table written (number int)").await;
    let (locked, is_locked) = oneshot::channel();
    let (end, is_ended) = oneshot::channel::<()>();
    let first = with_transaction_lock(&database, KEY, SOON, async |connection| {
        locked.send(()).unwrap();
        is_ended.await.unwrap();
        insert(connection).await
    });
    let second = async {
        is_locked.await.unwrap();
        let other = with_transaction_lock(&database, KEY, SOON, insert).await;
        end.send(()).unwrap();
        other
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!((first.unwrap(), second.unwrap()), (Some(()), None));
    assert_eq!(written(&pool).await, 1);
    no_lock_is_held(&pool).await;
}

#[tokio::test]
async fn work_that_fails_or_takes_too_long_leaves_nothing_behind() {
    let world = World::bare().await;
    let pool = world.database().await;
    let database = connect(&world.database_url());
    execute(&pool, "create table written (number int)").await;
    let fails = async |connection: &mut PgConnection| {
        insert(connection).await?;
        Err::<(), _>(DatabaseError::from(sqlx::Error::RowNotFound))
    };
    let error = with_transaction_lock(&database, KEY, SOON, fails)
        .await
        .unwrap_err();
    assert!(
        !error.to_string().contains("within"),
        "the work's own error: {error}"
    );
    let hangs = async |connection: &mut PgConnection| {
        insert(connection).await?;
        std::future::pending::<Result<(), DatabaseError>>().await
    };
    let limit = Duration::from_millis(100);
    let error = with_transaction_lock(&database, KEY, limit, hangs)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("did not answer within 100ms"),
        "{error}"
    );
    no_lock_is_held(&pool).await;
    assert_eq!(written(&pool).await, 0);
}

#[tokio::test]
async fn a_session_gives_its_lock_back_whatever_became_of_the_work() {
    let world = World::bare().await;
    let pool = world.database().await;
    let database = connect(&world.database_url());
    let other = async || {
        with_session_lock(&database, KEY, SOON, async |_: &mut PgConnection| {
            Ok::<_, DatabaseError>(())
        })
        .await
        .unwrap()
    };
    let while_locked = with_session_lock(&database, KEY, SOON, async |_: &mut PgConnection| {
        Ok::<_, DatabaseError>(other().await)
    });
    assert_eq!(while_locked.await.unwrap(), Some(None));
    assert_eq!(locks(&pool).await, 0);
    let fails =
        async |_: &mut PgConnection| Err::<(), _>(DatabaseError::from(sqlx::Error::RowNotFound));
    with_session_lock(&database, KEY, SOON, fails)
        .await
        .unwrap_err();
    assert_eq!(
        locks(&pool).await,
        0,
        "released before the error is returned"
    );
    assert_eq!(other().await, Some(()));
}
