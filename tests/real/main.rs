//! What is true of the program as it is used: processes, sockets, browsers and files.

mod aggregate;
mod browser;
mod coming_back;
mod compare;
mod defaults;
mod export;
mod field_console;
mod gate;
mod hub;
mod interrupted;
mod needs;
mod place;
mod plan_command;
mod real_model;
mod resume;
mod running;
mod runs;
mod tls;
mod uneven_adapters;
