//! Routes: HTTP requests to [`ApiCall`]s and results to HTTP answers.

use super::access;
use super::call::{ApiCall, ApiError, ApiResult, ErrorKind, Reply};
use super::server::ApiLimits;
use super::types::{
    AdoptVm, Cancel, ErrorBody, MigrationRequest, OfferRequest, Resolve, RunVm, Withdraw,
};
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

#[derive(Clone)]
struct Agent {
    calls: mpsc::Sender<ApiCall>,
    limits: ApiLimits,
}

type Body = Result<Bytes, BytesRejection>;

/// All routes, asking the agent behind `calls`.
pub(super) fn router(calls: mpsc::Sender<ApiCall>, limits: ApiLimits) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/vms", get(list_vms))
        .route("/v1/vms/run", post(run_vm))
        .route("/v1/vms/adopt", post(adopt_vm))
        .route("/v1/vms/{name}/stop", post(stop_vm))
        .route("/v1/offers", post(offer))
        .route("/v1/offers/{gang}", get(offers))
        .route("/v1/offers/{gang}/withdraw", post(withdraw))
        .route("/v1/migrations", get(list_migrations).post(migrate))
        .route("/v1/migrations/{id}", get(migration))
        .route("/v1/migrations/{id}/cancel", post(cancel))
        .route("/v1/gangs/{id}/resume", post(resume_gang))
        .route("/v1/handovers/resolve", post(resolve))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(limits.body))
        .layer(axum::middleware::from_fn(access::check))
        .with_state(Agent { calls, limits })
}

async fn status(State(agent): State<Agent>) -> Response {
    let call = |reply| ApiCall::Status { reply };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn list_vms(State(agent): State<Agent>) -> Response {
    let call = |reply| ApiCall::ListVms { reply };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn run_vm(State(agent): State<Agent>, body: Body) -> Response {
    let request: RunVm = match parse(body) {
        Ok(request) => request,
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::RunVm { request, reply };
    json(agent.ask(agent.limits.slow, call).await)
}

async fn adopt_vm(State(agent): State<Agent>, body: Body) -> Response {
    let request: AdoptVm = match parse(body) {
        Ok(request) => request,
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::AdoptVm { request, reply };
    json(agent.ask(agent.limits.slow, call).await)
}

async fn stop_vm(State(agent): State<Agent>, Path(name): Path<String>) -> Response {
    let call = |reply| ApiCall::StopVm { name, reply };
    json(agent.ask(agent.limits.slow, call).await)
}

async fn offer(State(agent): State<Agent>, body: Body) -> Response {
    let request: OfferRequest = match parse(body) {
        Ok(request) => request,
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::Offer { request, reply };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn offers(State(agent): State<Agent>, Path(gang): Path<String>) -> Response {
    let call = |reply| ApiCall::Offers { gang, reply };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn withdraw(State(agent): State<Agent>, Path(gang): Path<String>, body: Body) -> Response {
    let request: Withdraw = match parse(body) {
        Ok(request) => request,
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::Withdraw {
        gang,
        request,
        reply,
    };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn list_migrations(State(agent): State<Agent>) -> Response {
    let call = |reply| ApiCall::ListMigrations { reply };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn migrate(State(agent): State<Agent>, body: Body) -> Response {
    let request: MigrationRequest = match parse(body) {
        Ok(request) => request,
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::StartMigration { request, reply };
    json(agent.ask(agent.limits.slow, call).await)
}

async fn migration(State(agent): State<Agent>, Path(id): Path<String>) -> Response {
    let call = |reply| ApiCall::Migration { id, reply };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn cancel(State(agent): State<Agent>, Path(id): Path<String>, body: Body) -> Response {
    let empty = matches!(&body, Ok(body) if body.is_empty());
    let request = match parse(body) {
        Ok(request) => request,
        Err(_) if empty => Cancel::default(),
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::CancelMigration {
        id,
        vm: request.vm,
        reply,
    };
    json(agent.ask(agent.limits.quick, call).await)
}

async fn resume_gang(State(agent): State<Agent>, Path(id): Path<String>) -> Response {
    let call = |reply| ApiCall::ResumeGang { id, reply };
    json(agent.ask(agent.limits.slow, call).await)
}

async fn resolve(State(agent): State<Agent>, body: Body) -> Response {
    let request: Resolve = match parse(body) {
        Ok(request) => request,
        Err(error) => return refuse(error),
    };
    let call = |reply| ApiCall::Resolve { request, reply };
    json(agent.ask(agent.limits.slow, call).await)
}

async fn metrics(State(agent): State<Agent>) -> Response {
    let call = |reply| ApiCall::Metrics { reply };
    match agent.ask(agent.limits.quick, call).await {
        Ok(text) => {
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => refuse(error),
    }
}

async fn no_route() -> Response {
    refuse(ApiError::new(
        ErrorKind::NotFound,
        "no such path in this API",
        "see docs/operations.md for the paths there are",
    ))
}

async fn wrong_method() -> Response {
    let mut response = refuse(ApiError::new(
        ErrorKind::Invalid,
        "this path does not take that method",
        "see docs/operations.md for the paths there are",
    ));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

impl Agent {
    async fn ask<T>(
        &self,
        limit: Duration,
        call: impl FnOnce(Reply<T>) -> ApiCall,
    ) -> ApiResult<T> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let gone = || {
                ApiError::new(
                    ErrorKind::Failed,
                    "the agent dropped the request",
                    "look into the agent's log",
                )
            };
            self.calls.send(call(reply)).await.map_err(|_| gone())?;
            answer.await.unwrap_or_else(|_| Err(gone()))
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::new(
                ErrorKind::TimedOut,
                format!("the agent did not answer within {} s", limit.as_secs()),
                "it may still do what was asked: look with `drover status`, and into its log",
            )),
        }
    }
}

fn parse<T: DeserializeOwned>(body: Body) -> ApiResult<T> {
    let invalid = |error: String, remedy: &str| ApiError::new(ErrorKind::Invalid, error, remedy);
    let body = body.map_err(|e| invalid(e.body_text(), "send less"))?;
    serde_json::from_slice(&body).map_err(|e| {
        invalid(
            format!("the request's JSON is wrong: {e}"),
            "install the same drover command as the agent, or see docs/operations.md",
        )
    })
}

fn json<T: Serialize>(result: ApiResult<T>) -> Response {
    match result {
        Ok(value) => axum::Json(value).into_response(),
        Err(error) => refuse(error),
    }
}

/// The answer to a request that is not done.
pub(super) fn refuse(error: ApiError) -> Response {
    let status = match error.kind {
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorKind::Busy => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
    };
    let body = ErrorBody {
        error: error.error,
        remedy: error.remedy,
    };
    (status, axum::Json(body)).into_response()
}
