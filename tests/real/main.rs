//! What is true of the program as it is used: processes, sockets, browsers and files.

mod aggregate;
mod browser;
mod defaults;
mod export;
mod field_console;
mod gate;
mod hub;
mod needs;
mod plan_command;
mod real_model;
mod tls;
mod uneven_adapters;
